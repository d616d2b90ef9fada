"""ragjax.checkpoints: what is saved comes back bit for bit, and damage is told, not restored."""

import jax
import numpy as np
import optax
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.errors import UserError


def trees(seed: int = 0) -> dict:
    """Two trees as training has them: nested dicts, and an optimizer's state with named tuples and empty nodes."""
    rng = np.random.default_rng(seed)
    params = {
        "generator": {"lora": {"a": rng.standard_normal((3, 4)).astype(np.float32), "b": np.zeros((4, 2), np.float32)}},
        "embedder": {"params": {"bias": rng.standard_normal(5).astype(np.float32)}},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.0))
    _, state = optimizer.update(params, optimizer.init(params), params)
    return {"trainable": params, "optimizer": state}


def templates(value: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(one, other)


def test_trees_and_extras_come_back_bit_for_bit(tmp_path):
    saved, extras = trees(), {"cost": {"seconds": 1.25}, "ids": ["p1", "p2"], "phase": "joint"}
    Checkpoints(tmp_path / "c").save(3, saved, extras)
    step, restored, found = Checkpoints(tmp_path / "c").restore(templates(saved))
    assert step == 3
    assert found == extras
    assert_same(restored, saved)


def test_without_a_template_a_tree_comes_back_as_nested_dicts(tmp_path):
    saved = trees()
    Checkpoints(tmp_path).save(1, saved, {})
    _, restored, _ = Checkpoints(tmp_path).restore({"trainable": None})
    assert restored.keys() == {"trainable"}
    assert_same(restored["trainable"], saved["trainable"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.latest_step() is None
    for step in (2, 4, 7, 10):
        checkpoints.save(step, trees(step), {})
        assert checkpoints.latest_step() == step
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(["2", "4", "7", "10"][-keep:])
    step, restored, _ = Checkpoints(tmp_path).restore({"trainable": None})
    assert step == 10
    assert_same(restored["trainable"], trees(10)["trainable"])


def test_what_is_written_in_the_background_is_what_it_was_when_asked(tmp_path):
    """Also where its arrays are used again meanwhile, as a step does with a state that was donated to it."""
    checkpoints, saved = Checkpoints(tmp_path), jax.tree.map(np.array, trees(1))
    saved["trainable"]["large"] = np.zeros(2**22, np.float32)  # takes a while
    checkpoints.save(1, saved, {}, in_background=True)
    for leaf in jax.tree.leaves(saved):
        leaf[...] = 7
    assert checkpoints.steps() == [1]  # waits
    _, restored, _ = Checkpoints(tmp_path).restore({"trainable": None})
    assert not restored["trainable"].pop("large").any()
    assert_same(restored["trainable"], trees(1)["trainable"])


def test_a_write_that_fails_in_the_background_is_told_when_it_is_waited_for(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trees(1), {})

    finish = checkpoints._manager.wait_until_finished

    def full():
        finish()
        raise OSError(28, "No space left on device")

    checkpoints.save(2, trees(2), {}, in_background=True)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(UserError, match=r"step 2 could not be written to .* \(\[Errno 28\] No space"):
        checkpoints.wait()
    checkpoints.wait()  # it has been told


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trees(1), {"first": True})
    checkpoints.save(1, trees(2), {"first": False})
    _, restored, extras = checkpoints.restore({"trainable": None})
    assert extras == {"first": True}
    assert_same(restored["trainable"], trees(1)["trainable"])


def test_a_folder_without_checkpoints_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint: run ragjax.train"):
        Checkpoints(tmp_path).restore({"trainable": None})


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    Checkpoints(tmp_path).save(1, trees(1), {})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "trainable").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, trees(2), {})
    step, restored, _ = Checkpoints(tmp_path).restore({"trainable": None})
    assert step == 2
    assert_same(restored["trainable"], trees(2)["trainable"])


def flip(path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# Orbax's other reads end after its event loop has closed, and say so in the background.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_byte_of_the_weights_is_noticed(tmp_path):
    """In the middle of each of the weights' files: no restored value may differ unseen."""
    saved = trees()
    Checkpoints(tmp_path / "good").save(7, saved, {})
    files = [path for path in sorted((tmp_path / "good" / "7" / "trainable").rglob("*")) if path.is_file()]
    assert files
    noticed = 0
    for path in files:
        flip(path, path.stat().st_size // 2)
        try:
            _, restored, _ = Checkpoints(tmp_path / "good").restore({"trainable": templates(saved)["trainable"]})
            assert_same(restored["trainable"], saved["trainable"])
        except UserError as error:
            assert f"The checkpoint {tmp_path / 'good' / '7'} " in str(error)
            assert "bring back a copy of that folder" in str(error)
            noticed += 1
        flip(path, path.stat().st_size // 2)
    assert noticed


def test_the_stored_hash_is_compared(tmp_path, monkeypatch):
    """Values that orbax hands back whole, but not as they were saved."""
    import ragjax.checkpoints as module

    Checkpoints(tmp_path).save(7, trees(), {})
    hash_of = module.tree_sha256
    monkeypatch.setattr(module, "tree_sha256", lambda tree: hash_of(jax.tree.map(lambda leaf: leaf + 1, tree)))
    with pytest.raises(UserError, match="does not have the hash that was stored with it"):
        Checkpoints(tmp_path).restore({"trainable": None})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_who_goes_on_falls_back_to_the_newest_that_is_whole(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (3, 5, 8):
        checkpoints.save(step, trees(step), {"step": step})
    for path in [path for step in ("5", "8") for path in (tmp_path / step).rglob("*") if path.is_file()]:
        damage(path)
    step, restored, extras = Checkpoints(tmp_path).restore_newest(templates(trees()))
    assert step == 3 and extras == {"step": 3}
    assert_same(restored, trees(3))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: The checkpoint {tmp_path / '8'} cannot be read (")
    assert second.startswith(f"warning: The checkpoint {tmp_path / '5'} cannot be read (")
    assert second.endswith("), so it is deleted and the one of step 3 is used.")
    again = Checkpoints(tmp_path, keep=3)
    assert again.steps() == [3]
    again.save(5, trees(5), {"step": 5})
    assert Checkpoints(tmp_path).restore_newest(templates(trees()))[0] == 5


def test_where_nothing_fits_nothing_is_deleted(tmp_path):
    """Two checkpoints of something else: what is at fault are the templates."""
    for step in (1, 2):
        Checkpoints(tmp_path).save(step, trees(step), {})
    other = {"trainable": {"embedder": {"params": {"bias": np.zeros(6, np.float32)}}}}
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).restore_newest(other)
    assert str(caught.value).startswith(f"The checkpoint {tmp_path / '2'} ")
    assert str(caught.value).endswith(f"no other is left in {tmp_path}: delete that folder to start from step 0.")
    assert Checkpoints(tmp_path).steps() == [1, 2]
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none").restore_newest(other)


@pytest.mark.parametrize("fault", ["shape", "name", "part", "missing tree"])
def test_a_template_that_does_not_fit_is_refused(tmp_path, fault):
    saved = trees()
    Checkpoints(tmp_path).save(1, saved, {})
    wanted = {"trainable": templates(saved)["trainable"]}
    if fault == "shape":
        wanted["trainable"]["embedder"]["params"]["bias"] = jax.ShapeDtypeStruct((6,), np.float32)
    elif fault == "part":  # never the rest as placeholders, or as they were
        del wanted["trainable"]["generator"]
    elif fault == "name":
        wanted["trainable"]["embedder"]["params"]["other"] = wanted["trainable"]["embedder"]["params"].pop("bias")
    else:
        wanted = {"elsewhere": wanted["trainable"]}
    with pytest.raises(UserError) as caught:
        Checkpoints(tmp_path).restore(wanted)
    assert str(tmp_path / "1") in str(caught.value)
    assert "\n" not in str(caught.value)

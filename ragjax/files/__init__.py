"""Files of the whole house.

write_atomic, append_line, remove, read_text,
sha256_file, read_pieces, sync                            bytes and text                      plain.py
read_json, read_json_object, read_json_lines,
read_whole_lines, read_settings, write_json               JSON                                json_values.py
PlannedFile, plan_text, plan_json, plan_copy,
write_folder, new_folder, check_room, free_bytes          a new folder, whole or not at all   folders.py
KeyedRecords                                              lists of numbers by key             keyed_records.py
Seal                                                      large files, hashed once            seals.py
map_file, give_back                                       mapped files                        mapped.py
take_lock, lock_file                                      locks between processes             locks.py
default_cache_dir, caching, storing                       the cache                           cache.py

Of several processes the first alone writes (`ragjax.voice`): what the others are told to write is dropped, but for the
cache's files (`everywhere`), as each host has a cache of its own.
"""

from ragjax.files.cache import CACHE_MEND, caching, default_cache_dir, storing
from ragjax.files.folders import (
    PlannedFile,
    check_room,
    free_bytes,
    new_folder,
    plan_copy,
    plan_json,
    plan_text,
    write_folder,
)
from ragjax.files.json_values import (
    read_json,
    read_json_lines,
    read_json_object,
    read_settings,
    read_whole_lines,
    write_json,
)
from ragjax.files.keyed_records import KeyedRecords
from ragjax.files.locks import lock_file, take_lock
from ragjax.files.mapped import give_back, map_file
from ragjax.files.plain import append_line, read_pieces, read_text, remove, sha256_file, sync, write_atomic
from ragjax.files.seals import Seal

__all__ = [
    "CACHE_MEND",
    "KeyedRecords",
    "PlannedFile",
    "Seal",
    "append_line",
    "caching",
    "check_room",
    "default_cache_dir",
    "free_bytes",
    "give_back",
    "lock_file",
    "map_file",
    "new_folder",
    "plan_copy",
    "plan_json",
    "plan_text",
    "read_json",
    "read_json_lines",
    "read_json_object",
    "read_pieces",
    "read_settings",
    "read_text",
    "read_whole_lines",
    "remove",
    "sha256_file",
    "storing",
    "sync",
    "take_lock",
    "write_atomic",
    "write_folder",
    "write_json",
]

"""What a run would take of each device, told before any weights are loaded: `ragjax.train --dry_run`.

dry_run      the whole: what is printed, what is refused, what would fit    run.py
machines     devices by name, and those that are here                       machines.py
shapes       models of which only the shapes are known                      shapes.py
lengths      how long texts are: measured, or assumed                       lengths.py
batches      a phase's largest batch, as shapes                             batches.py
needs        a phase's step compiled, and what it takes                     needs.py
collectives  what the devices send each other, read from a compiled program collectives.py
"""

from ragjax.dry_run.run import dry_run

__all__ = ["dry_run"]

"""The commands: flags -> configuration -> one call.

prepare, index, train,
lr_search, compare,
evaluate, ask, export       what they read from the command line, and what they call
flags.py                    a flag for each field of a configuration
ends.py                     how a command ends: errors as one sentence, exit codes
console.py                  ask's prompt, history and streaming, and what it prints

`python -m ragjax.NAME` runs NAME.py of this folder, by way of the file NAME.py above it.
"""

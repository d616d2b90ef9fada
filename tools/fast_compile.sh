#!/bin/sh
# Usage: fast_compile.sh PYTHON
# Prints XLA flags for programs that are tiny and run once or twice, so that compiling them is most of the time: no
# LLVM optimisations, which takes half of it, and the older way of emitting a CPU's fused loops, which takes two thirds
# of the rest. A flag that this environment's XLA does not know would end the process, so each is tried.
for flag in --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false; do
    if XLA_FLAGS=$flag JAX_PLATFORMS=cpu "$1" -c 'import jax; jax.devices()' >/dev/null 2>&1; then
        printf '%s ' "$flag"
    fi
done

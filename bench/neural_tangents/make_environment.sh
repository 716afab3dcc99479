#!/usr/bin/env bash
# Make the environment in which the peer neural-tangents is measured: bash bench/neural_tangents/make_environment.sh
# [FOLDER]; without one, .venv beside this script, where the benchmark looks. Set OOC_NTK_BENCH_JAX to any other one.
# neural-tangents is archived. Of the releases of JAX that were tried its structured derivatives work with 0.4.23 and fail
# with 0.4.26 and later. Only its experimental part, which the benchmark leaves out, needs TensorFlow: it is installed
# without what it declares.
set -euo pipefail
place=${1:-$(cd "$(dirname "$0")" && pwd)/.venv}
python3 -m venv "$place"
"$place/bin/python" -m pip install --quiet "jax==0.4.23" "jaxlib==0.4.23" "numpy<2" "scipy<1.13" "frozendict>=2.3.8"
"$place/bin/python" -m pip install --quiet --no-deps "neural-tangents==0.6.5"
cd "$(dirname "$0")/../.." && "$place/bin/python" -m bench.neural_tangents.child --version
echo "made $place"

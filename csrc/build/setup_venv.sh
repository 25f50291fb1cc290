# Usage: setup_venv.sh VENV. Creates the virtual environment for the Makefile.
# Keeps the torch that $PYTHON already has, if it is 2.10 or later; otherwise installs $TORCH.
# Installs NVIDIA's compiler from PyPI if no nvcc is found.
set -euo pipefail
venv=$1

has_torch='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))'
if "$PYTHON" -c "$has_torch" 2>/dev/null; then
  "$PYTHON" -m venv --system-site-packages "$venv"
else
  "$PYTHON" -m venv "$venv"
  "$venv/bin/python" -m pip install -q "$TORCH"
fi
# pip learned --group in 25.1.
"$venv/bin/python" -m pip install -q "pip>=25.1"
"$venv/bin/python" -m pip install -q --group dev
toolkit=$("$venv/bin/python" csrc/build/toolchain.py)
if [ -n "$toolkit" ]; then
  # shellcheck disable=SC2086 # several requirements
  "$venv/bin/python" -m pip install -q $toolkit
fi

# Shared by train.sh and run.sh, to be sourced: finds the Python that has the packages, the active one
# or that of .venv. Other machines use the same path.
set -euo pipefail
has_packages() { "$1" -c 'import importlib.util as u; assert u.find_spec("dit_ds") and u.find_spec("torch")' 2> /dev/null; }
for PYTHON in "$(command -v python || true)" "$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python" ""; do
  if [[ -n $PYTHON ]] && has_packages "$PYTHON"; then break; fi
done
if [[ -z $PYTHON ]]; then
  echo "$(basename "$0"): no Python here has dit_ds; activate its environment, or make one with \`bash launch/quickstart.sh\`." >&2
  exit 2
fi

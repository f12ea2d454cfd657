#!/usr/bin/env bash
# shows a run over two nodes: launch, status, a node that loses its power, its return, the stop. The nodes are
# network namespaces of this machine, removed at the end; needs root, openssh-server and iproute2
#   bash scripts/demo_two_nodes.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python="$(project_python)"
cd "$PROJECT"
exec "$python" -m tests.integration.demo_two_nodes "$@"

#!/bin/bash
# Train on several machines that ssh reaches without a password, one torchrun on each. Ctrl-C stops all of them, after a
# checkpoint. The hosts, a "--", then the arguments of engine.train:
#
#     NPROC=8 bash ssh.sh node1 node2 -- my_recipe.toml --run.folder /shared/runs/one
#
# Every host has this folder at the same place, the same software, data and pretrained checkpoint; run.folder is on a
# file system that all of them share. The hosts know each other by the names that are given here.
#   NPROC (1)        ranks on each host, such as its GPUs
#   MIN_NODES (all)  the run goes on with so many hosts where others are lost; not without the first one
#   MAX_RESTARTS (3) how often torchrun starts the ranks again
#   PORT (29500)     a free port of the first host
#   PYTHON (python)  the interpreter on the hosts
#   EXPORT           variables for the hosts, as "NAME=value NAME=value"

set -u -o pipefail
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    hosts+=("$1")
    shift
done
if [ ${#hosts[@]} = 0 ] || [ $# = 0 ]; then
    echo "usage: bash ssh.sh HOST ... -- [RECIPE] [--section.key=value ...]" >&2
    exit 2
fi
shift

nodes=${MIN_NODES:-${#hosts[@]}}:${#hosts[@]}
id=$(date +%s)-$$ # of this start: a torchrun that is left of an earlier one is in another rendezvous

# Run a command, its words quoted for the shell of the host.
on() {
    local host=$1
    shift
    ssh -o BatchMode=yes -o ServerAliveInterval=15 "$host" "exec $(printf '%q ' "$@")" </dev/null
}

start() {
    local host=$1 settings exports
    shift
    settings=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150)
    if [ -n "${MIN_NODES:-}" ]; then # torchrun's own store would stay on a host that was lost
        settings+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    fi
    read -ra exports <<<"${EXPORT:-}"
    # exec: nothing but torchrun has the id in its command line, by which `stop` finds it.
    # shellcheck disable=SC2016
    on "$host" sh -c 'cd "$1" && shift && exec env "$@"' launch "$PWD" "${settings[@]}" ${exports[@]+"${exports[@]}"} \
        "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${NPROC:-1}" \
        --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" --local-addr "$host" \
        --max-restarts "${MAX_RESTARTS:-3}" --rdzv-id "$id" -m engine.train "$@" --run.resume auto
}

# torchrun passes SIGTERM on to its ranks, which save last/ and end. The brackets: the pattern does not find itself.
# shellcheck disable=SC2329
stop() {
    trap 'exit 130' INT TERM
    echo "stopping all hosts; Ctrl-C again only ends this script" >&2
    for host in "${hosts[@]}"; do
        on "$host" pkill -TERM -f "[-]-local-addr $host .*--rdzv-id $id" &
    done
}
trap stop INT TERM

started=()
for host in "${hosts[@]}"; do
    { start "$host" "$@" 2>&1 | sed -u "s/^/$host: /"; } & # one process, with the exit code of torchrun by pipefail
    started+=($!)
done
result=1 # unless the run ends well on some host
for process in "${started[@]}"; do
    wait "$process"
    code=$?
    while kill -0 "$process" 2>/dev/null; do # a signal has ended `wait`, not the process
        wait "$process"
        code=$?
    done
    if [ "$code" = 0 ]; then
        result=0
    fi
done
exit "$result"

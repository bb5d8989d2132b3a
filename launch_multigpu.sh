#!/usr/bin/env bash
# Start a training script on every GPU of this machine; without a GPU, as 2 processes on the CPU.
#   ./launch_multigpu.sh [SCRIPT.py] [FLAGS OF THE SCRIPT...]        # default: 05_sft_multigpu.py
#   NPROC=2 MAX_RESTARTS=3 ./launch_multigpu.sh 02_opt_multi_gpu_ddp.py --preset tiny
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host1 ./launch_multigpu.sh ...  # NODE_RANK=1 on the other
#
# Environment, with defaults (NCCL_DEBUG, CUDA_VISIBLE_DEVICES and all others pass through):
#   NPROC         processes on this machine (its GPUs)
#   MAX_RESTARTS  times that all start again from the checkpoint when one dies; one machine (0)
#   NNODES        machines (1); with several, NODE_RANK is 0 on the one that MASTER_ADDR names and
#                 1, 2, ... on the others, and all of them must see the same output folder
#   MASTER_PORT, RDZV_TIMEOUT   where they meet (29500; alone a free one), within what seconds (600)
#   OMP_NUM_THREADS   threads of a process (its share of the cores)
# The exit code is the script's: 143 after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, when it has written a
# checkpoint (it has TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 seconds) from which --resume goes on.

set -euo pipefail; fail() { echo "error: $*" >&2; exit 1; }
if [[ ${1-} == --help || ${1-} == -h ]]; then sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit; fi
script=$(dirname "$0")/05_sft_multigpu.py
if [[ ${1--} != -* ]]; then script=$1; shift; fi
[[ -f $script ]] || fail "$script does not exist; a script that does is 02_opt_multi_gpu_ddp.py"
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)' 2>/dev/null)} ||
    fail "python cannot import torch; activate the environment with requirements.txt"
: "${NNODES:=1}" "${MAX_RESTARTS:=0}" "${RDZV_TIMEOUT:=600}" "${NODE_RANK:=${SLURM_NODEID-}}"
for name in NPROC NNODES RDZV_TIMEOUT MAX_RESTARTS; do
    [[ $name${!name} =~ ^(MAX_RESTARTS0|[A-Z_]+[1-9][0-9]*)$ ]] ||
        fail "$name=${!name} must be a whole number, such as $name=2"
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + NPROC - 1) / NPROC))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # without it many restarts hang
meet=(--rdzv-backend=c10d --rdzv-endpoint="localhost:${MASTER_PORT:-0}" --rdzv-id="$$"
      --rdzv-conf=is_host=true --local-addr=localhost --max-restarts="$MAX_RESTARTS")
if ((NNODES > 1)); then
    [[ ${MASTER_ADDR-} && $NODE_RANK =~ ^[0-9]+$ && NODE_RANK -lt NNODES && MAX_RESTARTS -eq 0 ]] ||
        fail "NNODES=$NNODES needs MASTER_ADDR, a NODE_RANK below $NNODES, and MAX_RESTARTS=0"
    meet=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR"
          --master-port="${MASTER_PORT:-29500}" --rdzv-conf="timeout=$RDZV_TIMEOUT")
fi
signals=SIGTERM,SIGINT,SIGUSR1,SIGQUIT$([[ $(trap -p HUP) ]] || echo ,SIGHUP)  # respects nohup
exec python -c '  # torchrun, but a signal or a failure ends it with the exit code of the script
import os, psutil, signal as s, sys, threading
from torch.distributed import DistError, elastic, run
def stop(*signal):  # once: a second signal must not cut off the last checkpoint
    [s.signal(n, lambda *again: None) for n in (s.SIGTERM, s.SIGINT, s.SIGHUP, s.SIGUSR1)]
    raise elastic.multiprocessing.SignalException("", s.SIGTERM)
Agent = elastic.agent.server.api.SimpleElasticAgent
def leave(agent, wait=Agent._exit_barrier):  # for the others; after a cut cable, else for ever
    (thread := threading.Thread(target=wait, args=[agent], daemon=True)).start()
    thread.join(300); thread.is_alive() and os._exit(0)
elastic.multiprocessing.api._terminate_process_handler, Agent._exit_barrier = stop, leave
s.signal(s.SIGINT, s.SIG_DFL)  # while the machines meet, Python would only note it
try: run.main()
except elastic.multiprocessing.SignalException: sys.exit(143)
except elastic.multiprocessing.errors.ChildFailedError as end:
    sys.exit(n if (n := end.get_first_failure()[1].exitcode) > 0 else 128 - n)  # -9, SIGKILL: 137
except (ValueError, DistError, elastic.rendezvous.RendezvousError) as problem:
    sys.exit(f"error: {problem.__cause__ or problem} Is MASTER_PORT free, did all NNODES come?")
finally: [child.kill() for child in psutil.Process().children(recursive=True)]
' --nproc-per-node="$NPROC" --signals-to-handle="$signals" "${meet[@]}" "$script" "$@"

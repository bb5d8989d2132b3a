#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, with all its files in FOLDER, until SIGTERM:
#   tests/start_slurm.sh FOLDER [PORT]    # as root, after apt-get install slurm-wlm munge
# It prints "ready" when jobs can be submitted with SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=$(realpath "$1") port=${2:-26817} host=$(hostname -s) pids=()
end() {  # jobs first, or their processes would go on without Slurm
    if [[ -e $folder/ready ]]; then
        scancel --full --signal=KILL --user=root || true
        for ((i = 0; i < 50; i++)); do [[ $(squeue --noheader) ]] || break; sleep 0.2; done
    fi
    kill "${pids[@]}" 2>/dev/null || true
    wait
}
trap end EXIT
trap 'exit 0' TERM INT
export SLURM_CONF=$folder/slurm.conf
mkdir -p "$folder/state" "$folder"/spool-n{0,1}
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerParameters=sched_interval=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 Gres=gpu:2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 Gres=gpu:2
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE
CONF
# GPUs that Slurm counts and hands out; torch finds none, so that the scripts compute on the CPU.
printf 'NodeName=n[0-1] Name=gpu File=%s\n' /dev/null /dev/zero > "$folder/gres.conf"
dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
chmod 600 "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" > "$folder/munged.log" 2>&1 &
pids+=($!)
slurmctld -D > "$folder/slurmctld.log" 2>&1 &
pids+=($!)
for node in n0 n1; do
    slurmd -D -N $node > "$folder/$node.log" 2>&1 &
    pids+=($!)
done
for ((i = 0; i < 150; i++)); do
    [[ $(sinfo --noheader --Node --format=%t 2>/dev/null) != $'idle\nidle' ]] || break
    sleep 0.2
done
sinfo
touch "$folder/ready"
echo ready
wait

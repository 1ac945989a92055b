#!/usr/bin/env bash
# A throw-away SLURM cluster on this machine, for tests: N fake nodes, loopback only, no systemd, no
# accounting database, nothing written outside DIR.
#
#   cluster.sh install            apt-get install slurm-wlm and munge (Debian 12: SLURM 22.05; root)
#   cluster.sh start DIR          start munged, slurmctld and one slurmd per fake node; wait until all are idle
#   cluster.sh env DIR            print the line to eval in a shell that should talk to it
#   cluster.sh stop DIR           stop what start started (by the pids in DIR); the folder stays, for its logs
#   cluster.sh logs DIR           show the tails of the daemons' logs
#
#   D=$(mktemp -d); cluster.sh start "$D" && eval "$(cluster.sh env "$D")"
#   sinfo; srun -p gpu --gres=gpu:1 printenv CUDA_VISIBLE_DEVICES; cluster.sh stop "$D"
#
# DIR: absolute, short (a socket lies in it), new or one used before. Run as root, or as a plain user (jobs then run
# as that user). Settings by environment: SLURM_LOCAL_NODES (2), SLURM_LOCAL_CPUS per node (8, pretended),
# SLURM_LOCAL_MEM_MB per node (16000, pretended), SLURM_LOCAL_GPUS per node (4, pretended), SLURM_LOCAL_PORT (26817;
# slurmctld, then one port more per node).
#
# Partitions: main (default), gpu, low (preempted and requeued when high needs the room), high. Steps over their
# memory request are killed (by resident size, polled every 2 s). A requeued job waits 2 minutes before it starts
# again; `scontrol update job=ID StartTime=now` ends the wait.
# Snakemake needs `slurm-status-command: squeue` here (there is no database for sacct to ask: with sacct it waits
# for ever), and 500 MB or more a job for itself.
set -euo pipefail
cmd=${1:-help} dir=${2:-}
[[ $cmd == start || $cmd == stop || $cmd == env || $cmd == logs ]] && [[ $dir != /* ]] && { echo "DIR must be absolute" >&2; exit 2; }
nodes=${SLURM_LOCAL_NODES:-2} cpus=${SLURM_LOCAL_CPUS:-8} mem=${SLURM_LOCAL_MEM_MB:-16000} gpus=${SLURM_LOCAL_GPUS:-4}
port=${SLURM_LOCAL_PORT:-26817}
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

start() {
  mkdir -p "$dir"/{state,spool,log,run}; chmod 755 "$dir" "$dir"/*/
  local user host last i; user=$(id -un) host=$(hostname -s) last=$((nodes - 1))
  [[ -s $dir/munge.key ]] || { (umask 077; head -c 128 /dev/urandom >"$dir/munge.key"); }
  for ((i = 0; i < gpus; i++)); do ln -sfn /dev/null "$dir/gpu$i"; done
  cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=600
KillWait=5
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
DefMemPerCPU=500
CONF
  if ((gpus)); then
    echo "Name=gpu Flags=nvidia_gpu_env File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
    local gres="Gres=gpu:$gpus"
  else
    : >"$dir/gres.conf"; local gres=""
  fi
  for ((i = 0; i < nodes; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=$cpus RealMemory=$mem $gres State=UNKNOWN" >>"$dir/slurm.conf"
  done
  cat >>"$dir/slurm.conf" <<CONF
PartitionName=main Nodes=n[0-$last] Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=gpu  Nodes=n[0-$last] MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=low  Nodes=n[0-$last] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=n[0-$last] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  # Snakemake's job step drops every SLURM_* variable, SLURM_CONF too, before it calls srun: hence these wrappers
  mkdir -p "$dir/bin"
  local tool real
  for tool in srun sbatch salloc squeue scancel scontrol sinfo sacct sacctmgr sattach sstat sprio; do
    real=$(PATH=$(tr : '\n' <<<"$PATH" | grep -v "^$dir/bin$" | paste -sd:) command -v "$tool") || continue
    printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$real" >"$dir/bin/$tool"
    chmod 755 "$dir/bin/$tool"
  done
  munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
  slurmctld -f "$SLURM_CONF"
  for ((i = 0; i < nodes; i++)); do slurmd -f "$SLURM_CONF" -N "n$i"; done
  for ((i = 0; i < 100; i++)); do
    [[ $(sinfo -h -p main -t idle -o %D 2>/dev/null) == "$nodes" ]] && { sinfo; return 0; }
    sleep 0.2
  done
  sinfo >&2 || true; logs >&2; stop; return 1
}

stop() {
  local f pid
  if [[ -s $dir/run/slurmctld.pid ]]; then # end the jobs first, or their step daemons would stay behind
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do [[ -z $(timeout 5 squeue -h 2>/dev/null) ]] && break; sleep 0.2; done
  fi
  for f in "$dir"/run/slurmd.*.pid "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
    [[ -s $f ]] || continue
    pid=$(<"$f"); kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -0 "$pid" 2>/dev/null && kill -9 "$pid" || true
    rm -f "$f"
  done
}

logs() { tail -n 15 "$dir"/log/*.log; }

case $cmd in
  install)
    type slurmctld slurmd munged &>/dev/null && exit
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
    ;;
  start | stop | logs) $cmd ;;
  env) echo "export SLURM_CONF='$SLURM_CONF' PATH='$dir/bin':\"\$PATH\"" ;;
  *) sed -n '2,/^set /p' "$0" | sed '$d' ;;
esac

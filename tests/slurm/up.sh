#!/usr/bin/env bash
# Start a real Slurm of two nodes on this one machine (Debian or Ubuntu, root), or bring back the nodes of it that died.
#
#   tests/slurm/up.sh [FOLDER ...]       FOLDER: stays visible on every node although it lies under /tmp
#
# munged and slurmctld run on the machine itself.  A node is a stock slurmd in namespaces of its own: host name, network
# address on a bridge, processes, /tmp and /dev/shm.  Everything else of the file system is shared, as Lustre or NFS would
# be.  GPUs are null devices, so that Slurm counts and hands them out.  A node dies with kill -KILL "$(<$LAB/node01.pid)".
#
#   SORA_TEST_SLURM_GPUS      GPUs per node (2)        SORA_TEST_SLURM_KILL_WAIT   seconds from TERM to KILL (30)
set -euo pipefail
readonly LAB=/run/sora_slurm NET=10.213.77 BRIDGE=sora_slurm NODES=(node01 node02)
gpus=${SORA_TEST_SLURM_GPUS:-2} kill_wait=${SORA_TEST_SLURM_KILL_WAIT:-30}

[ "$(id -u)" = 0 ] || { echo "up.sh: needs root" >&2; exit 1; }
if [ -e /etc/slurm/slurm.conf ] && [ ! -e /etc/slurm/of_sora_llm_tests ]; then
  echo "up.sh: /etc/slurm/slurm.conf belongs to another Slurm; this is no machine to test on" >&2
  exit 1
fi

# ----- packages
for program in munged slurmctld slurmd srun ip unshare; do
  if ! command -v "$program" >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    [ -n "$(find /var/lib/apt/lists -name '*Packages*' -print -quit 2>/dev/null)" ] || apt-get update -qq
    # at run level 1 the packages start no daemons of their own
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client iproute2 util-linux \
      >/dev/null
    break
  fi
done

lives() { [ -s "$1" ] && kill -0 "$(<"$1")" 2>/dev/null; }

# ----- what nodes share: a name service, a key, a configuration
mkdir -p "$LAB"/{state,log,keep} /etc/slurm
touch /etc/slurm/of_sora_llm_tests
chmod 755 "$LAB"
{
  echo "127.0.0.1 localhost"
  echo "$NET.1 $(hostname)"
  for i in "${!NODES[@]}"; do echo "$NET.$((11 + i)) ${NODES[i]}"; done
} >"$LAB/hosts"
for ((g = 0; g < gpus; g++)); do [ -e "$LAB/gpu$g" ] || mknod -m 666 "$LAB/gpu$g" c 1 3; done

if ! lives "$LAB/munged.pid"; then
  rm -f "$LAB"/munge.*
  (umask 077 && head -c 1024 /dev/urandom >"$LAB/munge.key")
  munged --socket="$LAB/munge.socket" --key-file="$LAB/munge.key" --pid-file="$LAB/munged.pid" \
    --seed-file="$LAB/munge.seed" --log-file="$LAB/log/munged.log" --force 2>/dev/null
fi

# cred_expire below 5 counts as unset, 120, and a requeued job waits that long.  Preemption: a job in `main` takes the
# nodes of one in `spot`, which gets TERM and 20 s first.
{
  cat <<CONF
ClusterName=sora
SlurmctldHost=$(hostname)($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/munge.socket,cred_expire=5
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdPidFile=$LAB/slurmd.%n.pid
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmdSpoolDir=$LAB/spool.%n
StateSaveLocation=$LAB/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=$kill_wait
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
  for i in "${!NODES[@]}"; do
    echo "NodeName=${NODES[i]} NodeAddr=$NET.$((11 + i)) CPUs=8 RealMemory=1000 Gres=gpu:$gpus State=UNKNOWN"
  done
  echo "PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=10 PreemptMode=OFF"
  echo "PartitionName=spot Nodes=ALL DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
} >/etc/slurm/slurm.conf
echo "Name=gpu File=$LAB/gpu[0-$((gpus - 1))]" >/etc/slurm/gres.conf

# ----- the network and the controller
ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
ip addr replace "$NET.1/24" dev "$BRIDGE"
ip link set "$BRIDGE" up
lives "$LAB/slurmctld.pid" || slurmctld

# ----- the nodes
# /tmp of a node is its own but for the folders that were named; they are remembered for the next time a node starts.
for folder in "$@"; do
  kept="$LAB/keep/${folder//\//+}"
  [ -e "$kept" ] || ln -s "$folder" "$kept"
done
cat >"$LAB/node.sh" <<'NODE'
# the first process of a node, in its namespaces: $1 name, $2 address, $3 /run/sora_slurm
mount --make-rprivate /
hostname "$1"
mount --bind "$3/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$3/tmp.$1"
mount --rbind /tmp "$3/tmp.$1"
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp
for kept in "$3"/keep/*; do
  [ -L "$kept" ] || continue
  folder=$(readlink "$kept")
  [[ $folder == /tmp/* ]] || continue
  mkdir -p "$folder"
  mount --bind "$3/tmp.$1/${folder#/tmp/}" "$folder"
done
umount -l "$3/tmp.$1"
until [ -e "$3/$1.connected" ]; do sleep 0.05; done
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
cd /
slurmd -N "$1"
while :; do sleep 3600 & wait $!; done # reaps orphans, as the first process has to
NODE
for i in "${!NODES[@]}"; do
  node=${NODES[i]}
  lives "$LAB/$node.pid" && continue
  rm -f "$LAB/$node.connected"
  ip link delete "sora_$node" 2>/dev/null || true
  env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 setsid \
    unshare --net --uts --pid --mount --ipc --fork --kill-child --mount-proc \
    bash "$LAB/node.sh" "$node" "$NET.$((11 + i))" "$LAB" >"$LAB/log/$node.log" 2>&1 </dev/null &
  unshared=$!
  for ((tries = 0; tries < 200; tries++)); do # its child is the node's first process
    read -r first _ <"/proc/$unshared/task/$unshared/children" || true
    [ -n "${first:-}" ] && [ "$(readlink "/proc/$first/ns/net")" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.05
  done
  echo "$first" >"$LAB/$node.pid"
  ip link add "sora_$node" type veth peer name eth0 netns "$first"
  ip link set "sora_$node" master "$BRIDGE" up
  touch "$LAB/$node.connected"
  first=
done

up() { sinfo --noheader --partition main --states idle,mixed,allocated --format %D | awk '{n += $1} END {print n + 0}'; }
for ((tries = 0; tries < 150; tries++)); do
  [ "$(up)" = "${#NODES[@]}" ] && exit 0
  sleep 0.2
done
sinfo --long --Node >&2
echo "up.sh: the nodes did not come up; see $LAB/log" >&2
exit 1

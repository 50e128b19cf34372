#!/usr/bin/env bash
# Stop the Slurm that up.sh started and remove all it left, the packages excepted.
set -uo pipefail
readonly LAB=/run/sora_slurm BRIDGE=sora_slurm

stop() { # pid file, signal: end that process, by force after 10 s
  [ -s "$1" ] || return 0
  local pid
  pid=$(<"$1")
  kill "-$2" "$pid" 2>/dev/null || return 0
  for ((tries = 0; tries < 100; tries++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null
}

for node in "$LAB"/node??.pid; do stop "$node" KILL; done # the first process of a node takes all others along
stop "$LAB/slurmctld.pid" TERM
stop "$LAB/munged.pid" TERM
for link in /sys/class/net/"$BRIDGE"/brif/*; do [ -e "$link" ] && ip link delete "$(basename "$link")" 2>/dev/null; done
ip link delete "$BRIDGE" 2>/dev/null
rm -rf "$LAB"
if [ -e /etc/slurm/of_sora_llm_tests ]; then rm -rf /etc/slurm; fi

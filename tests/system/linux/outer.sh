#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs the guest under test on a host whose KVM runs it: this machine, or an emulated one inside it.
# Usage: outer.sh FOLDER, with all it needs in the folder. "OUTER" lines are what the tests look at.
cd "$1" || exit 1
say() { echo "OUTER $*"; }
M=./minivmm
export TMPDIR="$PWD"
memory=256M
# Errors alone are not said: they could be in the middle of a line of inner.sh. Alerts are.
common="console=ttyS0 reboot=k panic=-1 root=/dev/vda rw loglevel=2"

start() { # STAGE COMMAND-LINE OPTIONS...: starts a guest; its output is in log
  local stage=$1 line=$2
  shift 2
  rm -f typed log errors
  mkfifo typed
  : > log
  # What types into the guest stays open until it has ended.
  sleep 1000 > typed &
  typist=$!
  timeout -s KILL 120 $M boot --kernel vmlinuz --initrd initrd.img --memory "$memory" --cpus 2 \
    --append "$common stage=$stage $line" "$@" < typed > log 2> errors &
  vmm=$!
}

seconds() { sed 's/[.].*//' /proc/uptime; }

expect() { # TEXT: waits for a line of the guest
  local end=$(($(seconds) + 60))
  until grep -q "INNER $1" log; do
    if ! kill -0 $vmm 2> /dev/null || [ "$(seconds)" -ge $end ]; then
      say "FAILED: no '$1' from the guest"
      return 1
    fi
    sleep 0.1
  done
}

# What a guest that does not end has done so far, and where we are meanwhile.
watch_it() {
  sleep 80
  echo "STILL RUNS, and has said:"
  sed 's/\r$//; s/^/  /' log
  kill -USR1 $vmm
  sleep 2
  sed 's/^/  /' errors
  for process in $vmm $(pgrep -P $vmm); do  # `timeout` is either, as its author liked
    for task in /proc/"$process"/task/*; do
      echo "  $(cat "$task/comm"): $(tr '\n' ' ' < "$task/stack")"
    done
  done
}

finish() {
  watch_it &
  local watcher=$!
  wait $vmm
  local status=$?
  kill $typist $watcher
  wait $typist $watcher 2> /dev/null
  sed 's/\r$//; s/^/LOG /' log
  grep -v '^  ' errors | sed 's/^/ERR /'
  say "stage ended $status"
}

requests() { # DISK: how many requests its first queue has taken
  local before
  before=$(grep -c "^  $1: queue 0" errors)
  kill -USR1 $vmm
  for i in $(seq 100); do
    sleep 0.1
    [ "$(grep -c "^  $1: queue 0" errors)" -gt "$before" ] && break
  done
  sleep 0.1
  grep "^  $1: queue 0" errors | tail -1 | sed 's/.* \([0-9]*\) requests.*/\1/'
}

$M image create -q -f qcow2 -b root.raw -F raw root.qcow2
$M image create -q -f raw data.raw 24M
$M image create -q -f qcow2 blocks.qcow2 8M
head -c 1048576 /dev/urandom > fixed.raw
mkdir -p mnt
disks="--disk root.qcow2,id=root,serial=rootserial --disk data.raw,format=raw,id=data,serial=dataserial,num-queues=2
  --disk blocks.qcow2,id=blocks,logical_block_size=4096,physical_block_size=4096
  --disk fixed.raw,format=raw,id=fixed,ro"

fuse=""
[ -c /dev/fuse ] && fuse="--fuse mnt"
start 1 "" $disks --nbd 'nbd+unix:///?socket=m.sock' $fuse --export data --export fixed
expect "stage 1" || { finish; exit 1; }
for at in written trimmed; do
  expect "checkpoint $at" || { finish; exit 1; }
  sync
  say "$at $(stat -c %b data.raw)"
  echo go > typed
done
for at in "before through" "after through" "before back" "after back"; do
  expect "checkpoint $at" || { finish; exit 1; }
  say "$at $(requests blocks)"
  echo go > typed
done
expect "checkpoint sums" || { finish; exit 1; }
if [ -n "$fuse" ]; then
  say "fuse vdb $(sha256sum mnt/data | cut -d' ' -f1)"
  say "fuse vdd $(sha256sum mnt/fixed | cut -d' ' -f1)"
fi
if [ -x /usr/bin/nbdcopy ]; then
  for pair in vdb/data vdd/fixed; do
    nbdcopy "nbd+unix:///${pair#*/}?socket=m.sock" copy
    say "nbd ${pair%/*} $(sha256sum copy | cut -d' ' -f1)"
  done
fi
echo go > typed
finish
more="--disk driver=memory,size=1M,node-name=old,legacy=on"
i=0
for features in indirect_desc=off event_idx=off \
  indirect_desc=off,event_idx=off,logical_block_size=4096,queue-size=16; do
  i=$((i + 1))
  more="$more --disk driver=memory,size=1M,node-name=lean$i,$features"
done
for i in 4 5 6 7 8 9 10 11 12; do more="$more --disk driver=memory,size=1M,node-name=more$i"; done
# More than fits below the devices: the rest is above 4 GiB.
memory=3328M
start 2 "" $disks $more
finish
memory=256M
# Ends that are not asked for nicely. The disks are thrown away with what was written.
start triple reboot=t --disk root.qcow2,snapshot=on
finish
start panic "" --disk root.qcow2,snapshot=on
finish
# What quickstart shows where it can.
mkdir tour.d
mv tour.raw tour.d/root.raw
ln vmlinuz initrd.img tour.d
$M image create -q -f qcow2 -b root.raw -F raw tour.d/root.qcow2
if MINIVMM=$PWD/minivmm sh tour "$PWD/tour.d" > tour.out 2>&1; then say "tour ok"; else say "tour FAILED"; fi
sed 's/^/TOUR /' tour.out
for image in root.qcow2 blocks.qcow2; do
  if $M image check $image > check.log 2>&1; then say "check $image ok"; else
    say "check $image FAILED: $(cat check.log)"
  fi
done
say end

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first program of the guest under test. Its disks: vda the root (overlay), vdb data (raw,
# several queues), vdc a disk of 4096-byte blocks, vdd one that is read-only; in its second life also
# vde, in the register window of virtio-mmio version 1, vdf without indirect descriptors, vdg without
# event index, vdh with neither, and small ones up to vdq. stage= on the kernel's command line says
# which of its lives this is. "INNER" lines are what the tests look at.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
say() { echo "INNER $*"; }
check() { # NAME COMMAND...: says whether it succeeded
  local name=$1
  shift
  if "$@" > /tmp/out 2>&1; then say "$name ok"; else say "$name FAILED: $(cat /tmp/out)"; fi
}
attribute() { say "$1 $(cat "/sys/block/$1" 2>&1)"; }
# Waits until the host has looked and types a line.
checkpoint() {
  say "checkpoint $1"
  read -r answer
}
sum_of() { sha256sum "$1" | cut -d' ' -f1; }

stage=$(sed 's/.*stage=\([a-z0-9]*\).*/\1/' /proc/cmdline)
say "stage $stage cpus $(nproc) root $(grep ' / ' /proc/mounts | tail -1 | cut -d' ' -f1,3,4)"

first() {
  for disk in vda vdb vdc vdd; do
    attribute $disk/serial
    attribute $disk/ro
    attribute $disk/queue/logical_block_size
    attribute $disk/queue/physical_block_size
    attribute $disk/queue/discard_granularity
    attribute $disk/cache_type
    say "$disk queues $(ls /sys/block/$disk/mq | wc -l)"
  done
  say "rng $(cat /sys/class/misc/hw_random/rng_current 2>&1)"
  check "write to a read-only disk is refused" sh -c '! dd if=/dev/zero of=/dev/vdd bs=512 count=1 oflag=direct'
  echo "written in the first life" > /root/kept
  sync

  check mkfs /sbin/mke2fs -q -F -t ext4 /dev/vdb
  check mount mount -t ext4 /dev/vdb /mnt
  for i in 1 2 3 4 5 6; do
    dd if=/dev/urandom of=/mnt/file$i bs=64k count=$((i * 4)) conv=fsync 2> /dev/null
  done
  (cd /mnt && sha256sum file*) > /root/sums
  sync
  check umount umount /mnt
  check "mount again" mount -t ext4 /dev/vdb /mnt
  check "data after remount" sh -c 'cd /mnt && sha256sum -c /root/sums'
  checkpoint written
  rm /mnt/file5 /mnt/file6
  sync  # blocks are free when the journal says so
  sed -i '/file[56]/d' /root/sums
  check fstrim fstrim -v /mnt
  checkpoint trimmed
  check umount umount /mnt

  check "4096-byte blocks" sh -c 'dd if=/root/sums of=/dev/vdc bs=4096 count=1 conv=sync oflag=direct &&
    dd if=/dev/vdc bs=4096 count=1 iflag=direct | head -c $(stat -c %s /root/sums) | cmp - /root/sums'

  # What a flush costs is seen on the host: with the cache written through, the kernel sends none.
  for mode in "write through" "write back"; do
    echo "$mode" > /sys/block/vdc/cache_type
    attribute vdc/cache_type
    checkpoint "before ${mode#write }"
    for i in 1 2 3 4 5 6 7 8; do
      dd if=/root/sums of=/dev/vdc bs=4096 count=1 conv=sync,fsync 2> /dev/null
    done
    checkpoint "after ${mode#write }"
  done
  sync
  say "sum vdb $(sum_of /dev/vdb)"
  say "sum vdd $(sum_of /dev/vdd)"
  checkpoint sums
  mount -o remount,ro / 2> /dev/null
  sync
  say reboot
  reboot -f
}

second() {
  check "kept across the reboot" grep -q "first life" /root/kept
  check mount mount -t ext4 /dev/vdb /mnt
  check "data after the reboot" sh -c 'cd /mnt && sha256sum -c /root/sums'
  say "memory $(($(sed -n 's/MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo) >> 20)) GiB," \
    "above 4 GiB $(grep -c '^100000000-.*System RAM' /proc/iomem)"
  say "disks $(ls -d /sys/block/vd* | wc -l)"
  dd if=/dev/urandom of=/tmp/some bs=512k count=2 2> /dev/null
  dd if=/tmp/some of=/tmp/moved bs=512k skip=1 2> /dev/null
  for disk in vde vdf vdg vdh vdq; do
    # Requests of many segments, then many requests at a time.
    check "$disk works" sh -c "dd if=/tmp/some of=/dev/$disk bs=512k oflag=direct conv=fsync &&
      dd if=/dev/$disk bs=512k iflag=direct | cmp - /tmp/some &&
      dd if=/tmp/moved of=/dev/$disk bs=4096 conv=fsync && echo 3 > /proc/sys/vm/drop_caches &&
      dd if=/dev/$disk bs=4096 count=128 | cmp - /tmp/moved"
    say "$disk driver features $(cat /sys/block/$disk/device/features)"
  done
  # All processors and queues at once.
  for i in 1 2 3 4; do
    dd if=/dev/urandom of=/mnt/parallel$i bs=256k count=4 conv=fsync 2> /dev/null &
  done
  wait
  say "interrupts $(grep virtio /proc/interrupts | tr -s ' ' | tr '\n' ';')"
  (cd /mnt && sha256sum parallel*) > /tmp/parallel
  umount /mnt
  mount -t ext4 /dev/vdb /mnt
  check "written in parallel" sh -c 'cd /mnt && sha256sum -c /tmp/parallel'
  check umount umount /mnt
  mount -o remount,ro / 2> /dev/null
  sync
  say poweroff
  poweroff -f
}

case $stage in
  1) first ;;
  2) second ;;
  triple) reboot -f ;;
  panic) echo c > /proc/sysrq-trigger ;;
esac
say "still here"
sleep 1000

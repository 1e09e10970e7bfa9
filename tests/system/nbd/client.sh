#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Uses an NBD export as a disk, through the kernel's own driver. Runs in the emulated host; "CLIENT"
# lines are what the test looks at.
cd "$1" || exit 1
. ./settings  # PORT
say() { echo "CLIENT $*"; }
try() { # NAME COMMAND...
  local name=$1
  shift
  if "$@" > out 2>&1; then
    say "$name ok"
  else
    say "$name FAILED $?"
    sed 's/^/CLIENT out /' out
  fi
}

ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
mkdir -p /mnt/nbd

attach() { # NAME CONNECTIONS OPTIONS...
  local name=$1 connections=$2
  shift 2
  try "attach $name $connections" /sbin/nbd-client -N "$name" -C "$connections" "$@" 10.0.2.2 "$PORT" \
    /dev/nbd0
  for i in $(seq 50); do
    [ "$(cat /sys/block/nbd0/size)" != 0 ] && break
    sleep 0.1
  done
}
detach() { try "detach $1" /sbin/nbd-client -d /dev/nbd0; }
sums() { (cd /mnt/nbd && sha256sum small large part | sha256sum | cut -c1-64); }

for connections in 1 4; do
  name=disk$connections
  attach $name $connections
  say "$name size $(cat /sys/block/nbd0/size)"
  try "mkfs $name" /sbin/mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
  try "mount $name" mount -t ext4 -o discard /dev/nbd0 /mnt/nbd
  echo "a few bytes" > /mnt/nbd/small
  # Written from several processes at once, so that the connections have something to share.
  for i in 1 2 3 4; do
    dd if=/dev/urandom of=/mnt/nbd/part$i bs=64k count=40 2> /dev/null &
  done
  wait
  cat /mnt/nbd/part[1-4] > /mnt/nbd/large
  dd if=/dev/urandom of=/mnt/nbd/part bs=4k count=600 conv=fsync 2> /dev/null
  sync
  before=$(sums)
  try "fstrim early $name" fstrim /mnt/nbd
  echo "$name" > /mnt/nbd/marker
  rm /mnt/nbd/part[1-4]
  sync
  try "fstrim $name" fstrim -v /mnt/nbd
  try "umount $name" umount /mnt/nbd
  try "e2fsck $name" /sbin/e2fsck -f -n /dev/nbd0
  detach $name

  # Again, read-only and with nothing cached.
  attach $name $connections -R
  try "mount again $name" mount -t ext4 -o ro,noload /dev/nbd0 /mnt/nbd
  [ "$(sums)" = "$before" ] && say "$name content ok" || say "$name content FAILED"
  say "$name sum $(sha256sum < /mnt/nbd/large | cut -c1-64)"
  try "umount again $name" umount /mnt/nbd
  detach "$name again"
done

attach readonly 1
say "readonly ro $(cat /sys/block/nbd0/ro)"
if dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync > out 2>&1; then
  say "readonly write FAILED"
else
  say "readonly write refused"
fi
detach readonly
say end

#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Uses an NBD export as a disk, through the kernel's own driver. Runs in the emulated host; "CLIENT"
# lines are what the test looks at.
cd "$1" || exit 1
. ./settings  # PORT, TLS_PORT
M=/work/minivmm
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

# With one connection by the reference client, with several by ours.
attach() { # NAME CONNECTIONS OPTIONS...
  local name=$1 connections=$2
  shift 2
  if [ "$connections" = 1 ]; then
    try "attach $name $connections" /sbin/nbd-client -N "$name" -C "$connections" "$@" 10.0.2.2 \
      "$PORT" /dev/nbd0
    for i in $(seq 50); do
      [ "$(cat /sys/block/nbd0/size)" != 0 ] && break
      sleep 0.1
    done
  else
    try "attach $name $connections" $M nbd connect -C "$connections" "$@" \
      "nbd://10.0.2.2:$PORT/$name" /dev/nbd0
    [ "$(cat /sys/block/nbd0/size)" != 0 ] || say "attach $name FAILED: no size"
  fi
}
detach() { # NAME CONNECTIONS
  if [ "$2" = 1 ]; then
    try "detach $1" /sbin/nbd-client -d /dev/nbd0
  else
    try "detach $1" $M nbd disconnect /dev/nbd0
    [ -e /sys/block/nbd0/pid ] && say "detach $1 FAILED: still connected"
  fi
}
refuse() { # NAME WORDS COMMAND...
  local name=$1 words=$2
  shift 2
  if "$@" > out 2>&1; then
    say "refuse $name FAILED"
  elif grep -q "$words" out; then
    say "refuse $name ok"
  else
    say "refuse $name FAILED"
    sed 's/^/CLIENT out /' out
  fi
}
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
  detach $name $connections

  # Again, read-only and with nothing cached.
  attach $name $connections -R
  try "mount again $name" mount -t ext4 -o ro,noload /dev/nbd0 /mnt/nbd
  [ "$(sums)" = "$before" ] && say "$name content ok" || say "$name content FAILED"
  say "$name sum $(sha256sum < /mnt/nbd/large | cut -c1-64)"
  try "umount again $name" umount /mnt/nbd
  detach "$name again" $connections
done

attach readonly 1
say "readonly ro $(cat /sys/block/nbd0/ro)"
if dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync > out 2>&1; then
  say "readonly write FAILED"
else
  say "readonly write refused"
fi
refuse busy "in use already" $M nbd connect "nbd://10.0.2.2:$PORT/readonly" /dev/nbd0
detach readonly 1
refuse "no device" "is not connected" $M nbd disconnect /dev/nbd0
refuse unknown "no export 'nosuch'" $M nbd connect "nbd://10.0.2.2:$PORT/nosuch" /dev/nbd0

# The kernel chooses a device; the block size is what was asked for.
device=$($M nbd connect -b 4096 -R -t 30 -N readonly "10.0.2.2:$PORT")
say "free $device $(cat /sys/block/nbd0/queue/logical_block_size) $(cat /sys/block/nbd0/ro)"
try "detach free" $M nbd disconnect "$device"

# With TLS, which a process does for the driver for as long as there is the device.
no_proxy() { # NAME
  for i in $(seq 100); do
    if ! pidof minivmm-tls > /dev/null; then
      say "$1 ok"
      return
    fi
    sleep 0.1
  done
  say "$1 FAILED: $(pidof minivmm-tls)"
}
refuse "tls needed" "wants TLS" $M nbd connect "nbd://10.0.2.2:$TLS_PORT/secret" /dev/nbd0
refuse "tls user" "holds no key for 'bob'" $M nbd connect \
  "nbds://bob@10.0.2.2:$TLS_PORT/secret?tls-psk-file=/work/keys.psk" /dev/nbd0
device=$($M nbd connect -C 2 --object tls-creds-psk,id=k,endpoint=client,dir=/work,username=alice \
  --tls-creds k "10.0.2.2:$TLS_PORT" -N secret /dev/nbd0)
say "tls $device size $(cat /sys/block/nbd0/size) proxies $(pidof minivmm-tls | wc -w)"
dd if=/dev/urandom of=/tmp/secret bs=1M count=8 2> /dev/null
try "tls write" dd if=/tmp/secret of=/dev/nbd0 bs=4M conv=fsync
[ "$(dd if=/dev/nbd0 bs=4M iflag=direct 2> /dev/null | sha256sum)" = "$(sha256sum < /tmp/secret)" ] &&
  say "tls content ok" || say "tls content FAILED"
say "tls sum $(sha256sum < /tmp/secret | cut -c1-64)"
refuse "tls busy" "in use already" $M nbd connect \
  "nbds://alice@10.0.2.2:$TLS_PORT/secret?tls-psk-file=/work/keys.psk" /dev/nbd0
try "detach tls" $M nbd disconnect /dev/nbd0
no_proxy "tls end"

# A server that is killed and comes back, on this machine: requests wait for it.
serve() {
  $M serve --disk /tmp/here.raw,format=raw,id=here --export here,writable \
    --object tls-creds-psk,id=k,endpoint=server,dir=/work \
    --nbd "nbd+unix:///?socket=/tmp/here.sock" --nbd "nbd+unix:///?socket=/tmp/tls.sock,tls-creds=k" \
    --ready-fd 3 3> /tmp/ready 2> /tmp/serve.log &
  server=$!
  for i in $(seq 100); do
    grep -q READY /tmp/ready 2> /dev/null && break
    sleep 0.1
  done
}
dd if=/dev/zero of=/tmp/here.raw bs=1M count=8 2> /dev/null
persist() { # NAME URI
  rm -f /tmp/ready
  serve
  $M nbd connect --persist --hold 60 "$2" /dev/nbd0 > /tmp/kept 2>&1 &
  keeper=$!
  for i in $(seq 100); do
    grep -q /dev/nbd0 /tmp/kept && break
    sleep 0.1
  done
  try "$1 write" dd if=/dev/urandom of=/dev/nbd0 bs=64k count=4 conv=fsync
  before=$(dd if=/dev/nbd0 bs=64k count=4 iflag=direct 2> /dev/null | sha256sum)
  kill -9 $server
  wait $server 2> /dev/null
  rm -f /tmp/ready
  (sleep 1; dd if=/dev/nbd0 bs=64k count=4 iflag=direct 2> /dev/null | sha256sum > /tmp/after) &
  reader=$!
  sleep 2
  serve
  wait $reader
  [ "$before" = "$(cat /tmp/after)" ] && say "$1 content ok" || say "$1 content FAILED"
  try "$1 connected" grep "connected again" /tmp/kept
  try "detach $1" $M nbd disconnect /dev/nbd0
  wait $keeper
  say "$1 status $?"
  kill $server
  wait $server
}
persist persist 'nbd+unix:///here?socket=/tmp/here.sock'
persist "tls persist" 'nbds+unix://alice@/here?socket=/tmp/tls.sock&tls-psk-file=/work/keys.psk'
no_proxy "tls persist end"

# By the name qemu-nbd: an image is a device, and its server ends with that, or that with the server.
Q=/tmp/qemu-nbd
ln -s $M $Q
gone() { # NAME
  for i in $(seq 100); do
    if [ ! -e /sys/block/nbd1/pid ] && ! pidof qemu-nbd > /dev/null; then
      say "$1 ok"
      return
    fi
    sleep 0.1
  done
  say "$1 FAILED: $(cat /sys/block/nbd1/pid 2>&1) $(pidof qemu-nbd)"
}
try "qemu connect" $Q -f raw -x named -c /dev/nbd1 /tmp/here.raw
say "qemu size $(cat /sys/block/nbd1/size) ro $(cat /sys/block/nbd1/ro)"
try "qemu write" dd if=/dev/urandom of=/dev/nbd1 bs=64k count=4 conv=fsync
cp /tmp/here.raw /tmp/other.raw
refuse "qemu busy" "in use already" $Q -f raw -c /dev/nbd1 /tmp/other.raw
before=$(dd if=/dev/nbd1 bs=64k count=4 iflag=direct 2> /dev/null | sha256sum)
try "qemu disconnect" $Q -d /dev/nbd1
gone "qemu end"
[ "$before" = "$(dd if=/tmp/here.raw bs=64k count=4 2> /dev/null | sha256sum)" ] &&
  say "qemu content ok" || say "qemu content FAILED"
try "qemu disconnect again" $Q -d /dev/nbd1
try "qemu read-only" $Q -r -f raw -c /dev/nbd1 /tmp/here.raw
say "qemu ro $(cat /sys/block/nbd1/ro)"
kill $(pidof qemu-nbd)
gone "qemu killed"
$Q -v -f raw -c /dev/nbd1 /tmp/here.raw > /tmp/verbose 2>&1 &
stays=$!
for i in $(seq 100); do
  grep -q "is now connected" /tmp/verbose && break
  sleep 0.1
done
try "qemu verbose" grep -F "NBD device /dev/nbd1 is now connected to /tmp/here.raw" /tmp/verbose
try "qemu verbose disconnect" $Q --disconnect /dev/nbd1
wait $stays
say "qemu verbose status $?"
refuse "qemu no image" "No such file" $Q -f raw -c /dev/nbd1 /tmp/nosuch
gone "qemu nothing"

# By vsock, on this machine's own loopback.
rm -f /tmp/ready
$M serve --disk /tmp/here.raw,format=raw,id=here --export here --nbd nbd+vsock://1:4321 \
  --ready-fd 3 3> /tmp/ready 2> /tmp/vsock.log &
server=$!
for i in $(seq 100); do
  grep -q READY /tmp/ready 2> /dev/null && break
  sleep 0.1
done
say "vsock $(/sbin/nbdinfo --size nbd+vsock://1:4321/here 2>&1)"
try "vsock uri" grep -F "NBD export at nbd+vsock://1:4321/here" /tmp/vsock.log
kill $server
say end

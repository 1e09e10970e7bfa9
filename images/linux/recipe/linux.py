# SPDX-License-Identifier: Apache-2.0
"""The guest's own files: an initramfs that loads modules and changes to a root file system, and that
root."""

import os

from .tree import Tree

VIRTIO_MMIO = ("virtio_mmio", "virtio_blk")

INITRAMFS_INIT = """#!/bin/busybox sh
# Loads the modules in /modules, then starts init= (or /sbin/init) on root=. Without root= it is a
# shell.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module parameters; do
  insmod "/modules/$module" $parameters || echo "initramfs: $module does not load"
done < /modules/list
root= init=/sbin/init mode=ro
for word in $(cat /proc/cmdline); do
  case $word in
    root=*) root=${word#root=} ;;
    init=*) init=${word#init=} ;;
    rw | ro) mode=$word ;;
  esac
done
if [ -z "$root" ]; then
  echo "initramfs: no root="
  setsid cttyhack sh
  poweroff -f
fi
for i in $(seq 100); do
  [ -b "$root" ] && break
  sleep 0.1
done
if mount -t ext4 -o "$mode" "$root" /sysroot; then
  mount -o move /dev /sysroot/dev
  umount /proc /sys
  exec switch_root /sysroot "$init"
fi
echo "initramfs: $root cannot be mounted"
poweroff -f
"""

ROOT_INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
[ -c /dev/null ] || mount -t devtmpfs dev /dev
hostname minivmm
end() {
  sync
  kill -KILL -1
  sleep 0.1
  mount -o remount,ro /
  exec busybox "$1" -f
}
# What the shell's own poweroff, reboot and halt send to this process.
trap 'end poweroff' USR2
trap 'end reboot' TERM
trap 'end halt' USR1
echo "A Linux guest of minivmm. 'poweroff' ends it."
cd /root
setsid cttyhack sh -l &
wait $!
end poweroff
"""


def initramfs(kernel, busybox, modules=VIRTIO_MMIO, parameters=None):
    """`modules` in this order, with what they need; `parameters` by the name of a module."""
    tree = Tree()
    for folder in ("proc", "sys", "dev", "sysroot", "tmp"):
        tree.folder(folder)
    tree.busybox(busybox)
    lines = []
    for path in kernel.modules(modules):
        name = os.path.basename(path)
        tree.file(f"modules/{name}", path, 0o644)
        more = (parameters or {}).get(name[:-3].replace("-", "_"), "")
        lines.append(f"{name} {more}".strip())
    tree.text("modules/list", "".join(line + "\n" for line in lines))
    tree.text("init", INITRAMFS_INIT, 0o755)
    return tree


def root(busybox):
    tree = Tree()
    for folder in ("proc", "sys", "dev", "tmp", "root", "mnt", "etc", "sbin"):
        tree.folder(folder)
    tree.text("sbin/init", ROOT_INIT, 0o755)
    tree.text("etc/passwd", "root::0:0:root:/root:/bin/sh\n")
    tree.text("etc/group", "root:x:0:\n")
    tree.busybox(busybox)
    return tree

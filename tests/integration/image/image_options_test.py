# SPDX-License-Identifier: Apache-2.0
"""Every option of every command of qemu-img 7.2, given to both: the same words, the same output,
exit status and, where something is written, the same image. What is meant to differ is in DIFFERS,
with the reason, and is tested to differ."""
import concurrent.futures
import filecmp
import json
import os
import re
import shutil
import struct
import tempfile

from image_case import ImageCase, main

# Rows that are answered differently, and why.
DIFFERS = {
    # What can be known without a password is told without one.
    "check crypt.qcow2", "check luks.img",
    # The line of the progress ends before the answer.
    "compare -p base.raw base.qcow2", "compare -p base.qcow2 top.qcow2",
    "create -f qcow2 -o encrypt.format=frob out 1M",
    # Names of nodes have no meaning here; the file is what is missing.
    "info --image-opts base.qcow2",
    # The file's name, and not all options as JSON.
    "info --object secret,id=s,data=geheim --image-opts driver=luks,key-secret=s,"
    "file.filename=luks.img",
    "info --object secret,id=s,data=geheim --image-opts driver=qcow2,encrypt.key-secret=s,"
    "file.filename=crypt.qcow2",
    # What is zero is one range, whether or not its cluster has a place for it.
    "map --output=json ext.qcow2",
    # Requests of no bytes are no requests.
    "bench -s 0 base.qcow2",
    # Found out before anything is made.
    "convert -O qcow2 -B nowhere -F qcow2 mid.qcow2 out",
    # A newline more.
    "create -f qcow2 -b base.qcow2 out",
    # What there is, is said.
    "create -f qcow2 -o compression_type=frob out 1M",
    # A size that is too large, and no arithmetic that overflows.
    "resize base.qcow2 9E",
    # Opened once, warned of once.
    "snapshot -a s3 base.raw",
    # The reason instead of a number.
    "snapshot -c s3 data.qcow2",
}

# Words of a command line, split at spaces; '' is an empty word.
READS = {
    "info": """
        info base.qcow2
        info top.qcow2
        info -f qcow2 base.qcow2
        info -f raw base.qcow2
        info -f frob base.qcow2
        info --output=json base.qcow2
        info --output=human base.qcow2
        info --output json top.qcow2
        info --output=xml base.qcow2
        info --backing-chain top.qcow2
        info --backing-chain --output=json top.qcow2
        info --backing-chain base.raw
        info -U base.qcow2
        info --force-share snap.qcow2
        info snap.qcow2
        info --output=json snap.qcow2
        info bits.qcow2
        info --output=json bits.qcow2
        info luks.img
        info -f luks luks.img
        info --output=json luks.img
        info crypt.qcow2
        info --output=json crypt.qcow2
        info data.qcow2
        info v2.qcow2
        info ext.qcow2
        info zstd.qcow2
        info --image-opts driver=qcow2,file.filename=base.qcow2
        info --image-opts --output=json driver=qcow2,file.driver=file,file.filename=top.qcow2
        info --image-opts driver=raw,file.filename=base.raw
        info --image-opts file.filename=base.qcow2
        info --image-opts -f qcow2 file.filename=base.qcow2
        info --image-opts --backing-chain driver=qcow2,file.filename=top.qcow2
        info --image-opts driver=qcow2,file.filename=nowhere
        info --image-opts driver=frob,file.filename=base.qcow2
        info --image-opts base.qcow2
        info --object secret,id=s,data=geheim luks.img
        info --object secret,id=s,data=geheim --image-opts driver=luks,key-secret=s,file.filename=luks.img
        info --object secret,id=s,data=geheim --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=crypt.qcow2
        info --object secret,data=x base.qcow2
        info --object frob,id=s base.qcow2
        info broken-chain.qcow2
        info --backing-chain broken-chain.qcow2
        info nowhere
        info
        info base.qcow2 base.raw
        info file:base.qcow2
        info ./base.qcow2
        info loop.qcow2
        info dirty.qcow2
        info corrupt.qcow2
        info odd.raw
        info empty.raw
    """,
    "check": """
        check base.qcow2
        check -q base.qcow2
        check -f qcow2 base.qcow2
        check -f raw base.qcow2
        check -f frob base.qcow2
        check base.raw
        check --output=json base.raw
        check --output=json base.qcow2
        check --output=human base.qcow2
        check --output=frob base.qcow2
        check -U base.qcow2
        check -T none base.qcow2
        check -T frob base.qcow2
        check -T writethrough snap.qcow2
        check snap.qcow2
        check bits.qcow2
        check --output=json snap.qcow2
        check leaky.qcow2
        check -q leaky.qcow2
        check --output=json leaky.qcow2
        check --image-opts driver=qcow2,file.filename=base.qcow2
        check --image-opts --output=json driver=qcow2,file.filename=leaky.qcow2
        check --image-opts driver=raw,file.filename=base.raw
        check --image-opts driver=qcow2,file.driver=file,file.filename=top.qcow2
        check --image-opts -U driver=qcow2,file.filename=base.qcow2
        check --image-opts driver=qcow2,file.filename=nowhere
        check --object secret,id=s,data=geheim --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=crypt.qcow2
        check crypt.qcow2
        check luks.img
        check -r frob base.qcow2
        check zstd.qcow2
        check ext.qcow2
        check data.qcow2
        check top.qcow2
        check empty.raw
        check
        check base.qcow2 top.qcow2
        check nowhere
    """,
    "compare": """
        compare base.raw base.qcow2
        compare -f raw -F qcow2 base.raw base.qcow2
        compare -f raw base.raw base.qcow2
        compare -s base.raw base.qcow2
        compare -p base.raw base.qcow2
        compare -q base.raw base.qcow2
        compare -p -q base.raw base.qcow2
        compare base.qcow2 top.qcow2
        compare -s base.qcow2 top.qcow2
        compare -s base.qcow2 base.qcow2
        compare -p base.qcow2 top.qcow2
        compare -U base.qcow2 base.raw
        compare -T none base.raw base.qcow2
        compare -T frob base.raw base.qcow2
        compare --image-opts driver=raw,file.filename=base.raw driver=qcow2,file.filename=base.qcow2
        compare --image-opts driver=raw,file.filename=base.raw driver=qcow2,file.filename=top.qcow2
        compare --object secret,id=s,data=geheim --image-opts driver=luks,key-secret=s,file.filename=luks.img driver=raw,file.filename=base.raw
        compare base.raw short.raw
        compare -s base.raw short.raw
        compare base.qcow2 nowhere
        compare nowhere base.qcow2
        compare -f frob base.raw base.qcow2
        compare -F frob base.raw base.qcow2
        compare base.qcow2
        compare base.qcow2 base.qcow2 base.qcow2
        compare
        compare v2.qcow2 base.raw
        compare zstd.qcow2 base.raw
        compare ext.qcow2 base.raw
        compare data.qcow2 base.raw
        compare odd.raw base.raw
        compare broken-chain.qcow2 base.raw
    """,
    "map": """
        map base.qcow2
        map top.qcow2
        map -f qcow2 top.qcow2
        map -f raw base.qcow2
        map --output=json base.qcow2
        map --output=json top.qcow2
        map --output=human top.qcow2
        map --output=frob top.qcow2
        map --start-offset=256k top.qcow2
        map -s 256k top.qcow2
        map --max-length=300k top.qcow2
        map -l 300k --output=json top.qcow2
        map -s 100k -l 200k --output=json top.qcow2
        map -s 1000 -l 1000 --output=json top.qcow2
        map -s 1000 -l 1000 base.qcow2
        map --start-offset=90G --output=json top.qcow2
        map --start-offset=90G top.qcow2
        map --start-offset=x top.qcow2
        map --max-length=x top.qcow2
        map --start-offset=-1 top.qcow2
        map -l 0 --output=json base.qcow2
        map -U --output=json base.qcow2
        map --image-opts --output=json driver=qcow2,file.filename=top.qcow2
        map --image-opts driver=qcow2,file.filename=top.qcow2
        map --image-opts --output=json driver=raw,file.filename=base.raw
        map --object secret,id=s,data=geheim --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=crypt.qcow2
        map --object secret,id=s,data=geheim --output=json --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=crypt.qcow2
        map base.raw
        map --output=json base.raw
        map odd.raw
        map --output=json odd.raw
        map --output=json empty.raw
        map empty.raw
        map zstd.qcow2
        map --output=json zstd.qcow2
        map --output=json compressed.qcow2
        map compressed.qcow2
        map --output=json ext.qcow2
        map data.qcow2
        map --output=json data.qcow2
        map --output=json v2.qcow2
        map
        map nowhere
        map base.qcow2 top.qcow2
        map broken-chain.qcow2
    """,
    "measure": """
        measure base.raw
        measure -O raw base.qcow2
        measure -O qcow2 base.raw
        measure -O qcow2 base.qcow2
        measure -O qcow2 -o cluster_size=4k base.qcow2
        measure -O qcow2 -o cluster_size=2M,refcount_bits=1 base.qcow2
        measure -O qcow2 -o compat=0.10 base.qcow2
        measure -O qcow2 -o extended_l2=on base.qcow2
        measure -O qcow2 -o preallocation=full base.qcow2
        measure -O qcow2 -o preallocation=metadata base.qcow2
        measure -O qcow2 -o preallocation=falloc base.qcow2
        measure -O qcow2 -o encrypt.format=luks --size 1G
        measure -O luks --size 1G
        measure -O luks base.raw
        measure --size 1G
        measure --size 1000
        measure -O qcow2 --size 1G
        measure -O qcow2 --size 8E
        measure -O qcow2 --size 0
        measure -O qcow2 --size x
        measure -O qcow2 --size 1G base.raw
        measure -O qcow2 --output=json --size 1G
        measure -O qcow2 --output=human --size 1G
        measure -O qcow2 --output=frob --size 1G
        measure -O qcow2 --output=json bits.qcow2
        measure -O qcow2 bits.qcow2
        measure -O qcow2 -l s1 snap.qcow2
        measure -O qcow2 -l snapshot.name=s2 snap.qcow2
        measure -O qcow2 -l snapshot.id=1,snapshot.name=s1 snap.qcow2
        measure -O qcow2 -l snapshot.id=2,snapshot.name=s1 snap.qcow2
        measure -O qcow2 -l nosuch snap.qcow2
        measure -O qcow2 -l snapshot.frob=1 snap.qcow2
        measure -O qcow2 -l s1 base.qcow2
        measure -O qcow2 -l s1 base.raw
        measure -O qcow2 -l s1 --size 1G
        measure -l s1 -O raw snap.qcow2
        measure --image-opts -O qcow2 driver=qcow2,file.filename=base.qcow2
        measure --image-opts -l s1 -O qcow2 driver=qcow2,file.filename=snap.qcow2
        measure --image-opts -O qcow2 driver=qcow2,file.filename=nowhere
        measure -U -O qcow2 base.qcow2
        measure -f raw -O qcow2 base.qcow2
        measure -f frob -O qcow2 base.qcow2
        measure -O frob base.qcow2
        measure -O qcow2 -o frob=1 base.qcow2
        measure -O qcow2 -o cluster_size=3k base.qcow2
        measure -O raw -o preallocation=full base.raw
        measure -O raw -o frob=1 base.raw
        measure -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2
        measure -O qcow2 top.qcow2
        measure -O qcow2 zstd.qcow2
        measure -O qcow2 ext.qcow2
        measure -O qcow2 odd.raw
        measure -O qcow2 nowhere
        measure
        measure -O qcow2
        measure -O qcow2 base.raw base.qcow2
    """,
    "snapshot -l": """
        snapshot -l snap.qcow2
        snapshot -l base.qcow2
        snapshot -l -q snap.qcow2
        snapshot -l -U snap.qcow2
        snapshot -l --image-opts driver=qcow2,file.filename=snap.qcow2
        snapshot -l --image-opts driver=raw,file.filename=base.raw
        snapshot --image-opts -l -U driver=qcow2,file.filename=snap.qcow2
        snapshot --image-opts -l driver=qcow2,file.filename=nowhere
        snapshot -l -c x snap.qcow2
        snapshot -c x -c y snap.qcow2
        snapshot -a x -d y snap.qcow2
        snapshot -l -l snap.qcow2
        snapshot -l
        snapshot -l snap.qcow2 base.qcow2
        snapshot -l nowhere
        snapshot -l base.raw
        snapshot -l --object secret,id=s,data=geheim snap.qcow2
    """,
    "help": """
        create -f qcow2 -o help
        create -f qcow2 -o ?
        create -f raw -o help
        create -f luks -o help
        create -f frob -o help
        create -o help
        create -f qcow2 -o help out 1M
        create -f qcow2 -o cluster_size=4k,help out 1M
        amend -f qcow2 -o help
        amend -f qcow2 -o ? base.qcow2
        amend -f raw -o help
        amend -f luks -o help
        amend -f frob -o help
        amend -o help
        amend -o help base.qcow2
        convert -O qcow2 -o help
        convert -O raw -o help base.raw out
        convert -O luks -o help
        convert -O qcow2 -o help base.raw
        dd -O qcow2 -o help
        frob
        info --frob
        info -Z
        info -f
        --frob
    """,
}


WRITES = {
    "amend": """
        amend -o compat=0.10 base.qcow2
        amend -f qcow2 -o compat=1.1 v2.qcow2
        amend -p -f qcow2 -o compat=0.10 base.qcow2
        amend -p -q -f qcow2 -o compat=0.10 base.qcow2
        amend -q -f qcow2 -o lazy_refcounts=on base.qcow2
        amend -f qcow2 -o lazy_refcounts=on v2.qcow2
        amend -f qcow2 -o compat=0.10,lazy_refcounts=on base.qcow2
        amend -f qcow2 -o refcount_bits=64 base.qcow2
        amend -f qcow2 -o refcount_bits=1 base.qcow2
        amend -f qcow2 -o refcount_bits=1 snap.qcow2
        amend -f qcow2 -o refcount_bits=3 base.qcow2
        amend -f qcow2 -o refcount_bits=8 v2.qcow2
        amend -f qcow2 -o size=3M base.qcow2
        amend -f qcow2 -o size=512k base.qcow2
        amend -f qcow2 -o cluster_size=4k base.qcow2
        amend -f qcow2 -o extended_l2=on base.qcow2
        amend -f qcow2 -o preallocation=full base.qcow2
        amend -f qcow2 -o compression_type=zstd base.qcow2
        amend -f qcow2 -o backing_file=base.raw,backing_fmt=raw mid.qcow2
        amend -f qcow2 -o backing_fmt=raw mid.qcow2
        amend -f qcow2 -o backing_file= mid.qcow2
        amend -f qcow2 -o encrypt.format=luks base.qcow2
        amend -f qcow2 -o data_file=other.bin data.qcow2
        amend -f qcow2 -o data_file_raw=on data.qcow2
        amend -f qcow2 -o data_file=other.bin base.qcow2
        amend -f qcow2 -o frob=1 base.qcow2
        amend -f qcow2 -o compat=0.9 base.qcow2
        amend -f raw -o size=3M base.raw
        amend -f frob -o size=3M base.raw
        amend -t none -f qcow2 -o lazy_refcounts=on base.qcow2
        amend -t frob -f qcow2 -o lazy_refcounts=on base.qcow2
        amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=base.qcow2
        amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=nowhere
        amend --force -f qcow2 -o lazy_refcounts=on base.qcow2
        amend -f qcow2 base.qcow2
        amend -f qcow2 -o lazy_refcounts=on
        amend -f qcow2 -o lazy_refcounts=on nowhere
        amend
    """,
    "bench": """
        bench -f raw -c 20 -d 4 base.raw
        bench -c 20 -d 4 -s 8k -S 16k -o 64k base.qcow2
        bench -w -c 20 -d 4 -s 8k -S 16k -o 64k base.qcow2
        bench -w -c 4 -d 1 --pattern=17 -f qcow2 base.qcow2
        bench -w -c 8 -d 2 --flush-interval=2 -f qcow2 base.qcow2
        bench -w -c 8 -d 2 --flush-interval=2 --no-drain -f qcow2 base.qcow2
        bench -c 4 -d 1 -n -t none -f qcow2 base.qcow2
        bench -c 4 -d 1 -n -f qcow2 base.qcow2
        bench -c 4 -d 1 -i threads -f qcow2 base.qcow2
        bench -c 4 -d 1 -i io_uring -f qcow2 base.qcow2
        bench -c 4 -d 1 -i native -t none -f qcow2 base.qcow2
        bench -c 4 -d 1 -i native -f qcow2 base.qcow2
        bench -c 4 -d 1 -i frob -f qcow2 base.qcow2
        bench -c 4 -d 1 -q -f qcow2 base.qcow2
        bench -c 4 -d 1 -U -f qcow2 base.qcow2
        bench -w -c 4 -d 1 -U -f qcow2 base.qcow2
        bench -c 4 -d 1 -t frob -f qcow2 base.qcow2
        bench -c 4 -d 1 -t directsync -f qcow2 base.qcow2
        bench --image-opts -c 4 -d 1 driver=qcow2,file.filename=base.qcow2
        bench -c 4 -d 1 -f frob base.qcow2
        bench -c 0 base.qcow2
        bench -c -1 base.qcow2
        bench -d x base.qcow2
        bench -o -1 base.qcow2
        bench -S x base.qcow2
        bench -s 0 base.qcow2
        bench -s 3G base.qcow2
        bench --pattern=256 -w base.qcow2
        bench --flush-interval=1 -d 4 -w base.qcow2
        bench -c 4 nowhere
        bench base.qcow2 base.raw
    """,
    "bitmap": """
        bitmap --add base.qcow2 b
        bitmap --add -f qcow2 base.qcow2 b
        bitmap --add -f raw base.raw b
        bitmap --add -g 1M base.qcow2 b
        bitmap --add --image-opts driver=qcow2,file.filename=base.qcow2 b
        bitmap --remove --image-opts driver=qcow2,file.filename=bits.qcow2 b0
        bitmap --add bits.qcow2 b0
        bitmap --remove bits.qcow2 b0
        bitmap --clear bits.qcow2 b0
        bitmap --enable bits.qcow2 b1
        bitmap --disable bits.qcow2 b0
        bitmap --merge b0 bits.qcow2 b1
        bitmap --add --merge b0 --disable bits.qcow2 b9
        bitmap --add --merge b0 -b bits.qcow2 -F qcow2 base.qcow2 b
        bitmap --add --merge b0 -b bits.qcow2 base.qcow2 b
        bitmap --merge b0 -b nowhere -F qcow2 bits.qcow2 b1
        bitmap --add -f frob base.qcow2 b
        bitmap --add v2.qcow2 b
        bitmap --frob base.qcow2 b
        bitmap --add base.qcow2
        bitmap --add base.qcow2 b c
        bitmap --add nowhere b
    """,
    "check -r": """
        check -r leaks base.qcow2
        check -r all base.qcow2
        check -r leaks leaky.qcow2
        check -r all leaky.qcow2
        check -q -r all leaky.qcow2
        check -r all --output=json leaky.qcow2
        check -r all -f qcow2 dirty.qcow2
        check -r all corrupt.qcow2
        check -r leaks -T none leaky.qcow2
        check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2
        check -r all -U leaky.qcow2
        check -r all base.raw
        check -r all nowhere
    """,
    "commit": """
        commit top.qcow2
        commit -f qcow2 top.qcow2
        commit -q top.qcow2
        commit -p mid.qcow2
        commit -p -q mid.qcow2
        commit -d top.qcow2
        commit -b base.qcow2 top.qcow2
        commit -b mid.qcow2 top.qcow2
        commit -d -b base.qcow2 top.qcow2
        commit -b nowhere top.qcow2
        commit -b top.qcow2 top.qcow2
        commit -r 100M mid.qcow2
        commit -r x mid.qcow2
        commit -t none mid.qcow2
        commit -t unsafe mid.qcow2
        commit -t frob mid.qcow2
        commit --image-opts driver=qcow2,file.filename=mid.qcow2
        commit --image-opts -d driver=qcow2,file.filename=top.qcow2
        commit --image-opts -b base.qcow2 driver=qcow2,file.filename=top.qcow2
        commit --image-opts driver=qcow2,file.filename=nowhere
        commit --object secret,id=s,data=x mid.qcow2
        commit base.qcow2
        commit base.raw
        commit -f frob mid.qcow2
        commit broken-chain.qcow2
        commit nowhere
        commit
        commit mid.qcow2 top.qcow2
    """,
    "convert": """
        convert base.raw out
        convert -f raw -O raw base.raw out
        convert -O qcow2 base.raw out
        convert -O luks base.raw out
        convert -O frob base.raw out
        convert -f frob base.raw out
        convert -O qcow2 -o compat=0.10 base.raw out
        convert -O qcow2 -o cluster_size=2M,extended_l2=on base.raw out
        convert -O qcow2 -o preallocation=metadata base.raw out
        convert -O raw -o preallocation=falloc base.raw out
        convert -O raw -o preallocation=full base.raw out
        convert -O qcow2 -o size=2M base.raw out
        convert -O qcow2 -o size=512k base.raw out
        convert -p base.raw out
        convert -q base.raw out
        convert -p -q base.raw out
        convert -U base.qcow2 out
        convert -C base.raw out
        convert -C -O qcow2 base.qcow2 out
        convert -S 0 base.raw out
        convert -S 64k base.raw out
        convert -S 512 base.raw out
        convert -S 17M base.raw out
        convert -m 1 base.raw out
        convert -m 16 -W base.raw out
        convert -m 17 base.raw out
        convert -W base.raw out
        convert -r 1G base.raw out
        convert -r 1G -p base.raw out
        convert -r x base.raw out
        convert --salvage base.raw out
        convert --salvage -C base.raw out
        convert --salvage -O qcow2 top.qcow2 out
        convert -t none base.raw out
        convert -t directsync -T none base.raw out
        convert -t writethrough base.raw out
        convert -t frob base.raw out
        convert -T frob base.raw out
        convert -n -O raw base.raw short.raw
        convert -n -O raw short.raw base.raw
        convert -n -O qcow2 base.raw v2.qcow2
        convert -n --target-is-zero -O raw short.raw base.raw
        convert --target-is-zero -O raw base.raw out
        convert -n -O raw base.raw nowhere
        convert -n --target-image-opts base.raw driver=qcow2,file.filename=v2.qcow2
        convert --target-image-opts base.raw driver=qcow2,file.filename=v2.qcow2
        convert -n --target-image-opts -O qcow2 base.raw driver=qcow2,file.filename=v2.qcow2
        convert --image-opts -O qcow2 driver=qcow2,file.filename=top.qcow2 out
        convert --image-opts -O qcow2 driver=qcow2,file.filename=nowhere out
        convert --image-opts -f raw -O qcow2 file.filename=base.raw out
        convert -l s1 -O raw snap.qcow2 out
        convert -l 2 -O qcow2 snap.qcow2 out
        convert -l snapshot.id=1 -O qcow2 snap.qcow2 out
        convert -l snapshot.name=s2 -O qcow2 snap.qcow2 out
        convert -l snapshot.id=1,snapshot.name=s2 -O qcow2 snap.qcow2 out
        convert -l nosuch -O qcow2 snap.qcow2 out
        convert -l s1 -O qcow2 base.raw out
        convert -l s1 -O qcow2 base.raw snap.qcow2 out
        convert --bitmaps -O qcow2 bits.qcow2 out
        convert --bitmaps -O raw bits.qcow2 out
        convert --bitmaps -O qcow2 base.raw out
        convert --bitmaps -O qcow2 -o compat=0.10 bits.qcow2 out
        convert --bitmaps --skip-broken-bitmaps -O qcow2 bits.qcow2 out
        convert --skip-broken-bitmaps -O qcow2 bits.qcow2 out
        convert --bitmaps -O qcow2 bits.qcow2 base.qcow2 out
        convert --bitmaps -n -O qcow2 bits.qcow2 bits.qcow2
        convert -O qcow2 -B base.qcow2 -F qcow2 mid.qcow2 out
        convert -O qcow2 -B base.qcow2 mid.qcow2 out
        convert -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 mid.qcow2 out
        convert -O qcow2 -o backing_file=base.qcow2 mid.qcow2 out
        convert -O qcow2 -B nowhere -F qcow2 mid.qcow2 out
        convert -O raw -B base.qcow2 -F qcow2 mid.qcow2 out
        convert -n -O qcow2 -B base.qcow2 -F qcow2 mid.qcow2 v2.qcow2
        convert -O qcow2 -F qcow2 mid.qcow2 out
        convert -O qcow2 base.raw base.qcow2 out
        convert -O qcow2 base.raw
        convert -O qcow2 nowhere out
        convert -O qcow2 base.raw nowhere/out
        convert -O qcow2 base.raw base.raw
        convert -O qcow2 broken-chain.qcow2 out
        convert -O qcow2 -o frob=1 base.raw out
        convert -n -o size=1M base.raw short.raw
        convert -O qcow2 odd.raw out
        convert -O raw odd.raw out
        convert -O raw empty.raw out
        convert -O qcow2 empty.raw out
        convert -O qcow2 zstd.qcow2 out
        convert -O raw data.qcow2 out
        convert -O raw compressed.qcow2 out
        convert --object secret,id=s,data=geheim --image-opts -O raw driver=luks,key-secret=s,file.filename=luks.img out
        convert --object secret,id=s,data=falsch --image-opts -O raw driver=luks,key-secret=s,file.filename=luks.img out
        convert -O raw luks.img out
        convert -O raw crypt.qcow2 out
    """,
    "create": """
        create out 1M
        create -f raw out 1M
        create -q -f qcow2 out 1M
        create -f qcow2 out 1M
        create -f qcow2 -o compat=0.10 out 1M
        create -f qcow2 -o preallocation=metadata out 1M
        create -f qcow2 -o cluster_size=4k -o refcount_bits=8 out 1M
        create -f qcow2 -o cluster_size=4k,refcount_bits=8,lazy_refcounts=on out 1M
        create -f qcow2 -o encryption=on out 1M
        create -f qcow2 -o nocow=on out 1M
        create -f qcow2 -o nocow=off out 1M
        create -f raw -o nocow=on out 1M
        create -f raw -o extent_size_hint=1M out 1M
        create -f qcow2 -o extent_size_hint=1M out 1M
        create -f raw -o extent_size_hint=x out 1M
        create -f raw -o preallocation=falloc out 1M
        create -f raw -o preallocation=metadata out 1M
        create -f qcow2 -o size=2M out
        create -f qcow2 -o size=2M out 1M
        create -f qcow2 -b base.qcow2 -F qcow2 out
        create -f qcow2 -b base.qcow2 -F qcow2 out 3M
        create -f qcow2 -b base.qcow2 out
        create -f qcow2 -b nowhere -F qcow2 out
        create -f qcow2 -b nowhere -F qcow2 out 1M
        create -f qcow2 -u -b nowhere -F qcow2 out 1M
        create -f qcow2 -u -b nowhere -F qcow2 out
        create -f qcow2 -u -b nowhere out 1M
        create -f qcow2 -b base.qcow2 -F frob out
        create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 out
        create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata out
        create -f qcow2 -F qcow2 out 1M
        create -f raw -b base.raw -F raw out 1M
        create -f qcow2 -o data_file=out.bin out 1M
        create -f qcow2 -o data_file=out.bin,data_file_raw=on out 1M
        create -f qcow2 -o data_file_raw=on out 1M
        create -f qcow2 -o compression_type=zstd out 1M
        create -f qcow2 -o compression_type=frob out 1M
        create -f qcow2 -o extended_l2=on out 1M
        create -f qcow2 -o extended_l2=on,cluster_size=4k out 1M
        create -f luks out 1M
        create --object secret,id=s,data=x -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s out 1M
        create -f qcow2 -o encrypt.format=frob out 1M
        create -f frob out 1M
        create -f qcow2 out
        create -f qcow2 out x
        create -f qcow2 out -1
        create -f qcow2 out 0
        create -f qcow2 out 1000
        create -f raw out 1000
        create -f raw out 0
        create -f qcow2 out 9E
        create -f qcow2 out 1M 2M
        create -f qcow2 nowhere/out 1M
        create -f qcow2 base.qcow2 1M
        create
        create -f qcow2
        create -f qcow2 file:out 1M
    """,
    "dd": """
        dd if=base.raw of=out
        dd -f raw -O qcow2 if=base.raw of=out
        dd -O raw if=base.qcow2 of=out
        dd bs=4k count=10 if=base.raw of=out
        dd bs=4k skip=5 if=base.raw of=out
        dd bs=1M if=base.raw of=out
        dd bs=4k skip=500 if=base.raw of=out
        dd -U if=base.qcow2 of=out
        dd --image-opts -O qcow2 if=driver=qcow2,file.filename=top.qcow2 of=out
        dd --object secret,id=s,data=x if=base.raw of=out
        dd -f frob if=base.raw of=out
        dd -O frob if=base.raw of=out
        dd if=nowhere of=out
        dd if=base.raw of=nowhere/out
        dd if=base.raw of=short.raw
        dd bs=4k count=10 if=base.raw of=short.raw
        dd if=base.raw
        dd frob=1 if=base.raw of=out
    """,
    "rebase": """
        rebase -b base.qcow2 -F qcow2 top.qcow2
        rebase -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
        rebase -p -b base.qcow2 -F qcow2 top.qcow2
        rebase -p -q -b base.qcow2 -F qcow2 top.qcow2
        rebase -q -b base.raw -F raw top.qcow2
        rebase -u -b base.raw -F raw top.qcow2
        rebase -u -b nowhere -F qcow2 top.qcow2
        rebase -u -p -b nowhere -F qcow2 top.qcow2
        rebase -b '' top.qcow2
        rebase -u -b '' top.qcow2
        rebase -t none -T none -b base.qcow2 -F qcow2 top.qcow2
        rebase -t frob -b base.qcow2 -F qcow2 top.qcow2
        rebase -T frob -b base.qcow2 -F qcow2 top.qcow2
        rebase -U -b base.qcow2 -F qcow2 top.qcow2
        rebase -U -u -b base.qcow2 -F qcow2 top.qcow2
        rebase --image-opts -b base.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2
        rebase --image-opts -u -b base.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2
        rebase -b base.raw -F frob top.qcow2
        rebase -u -b base.raw -F frob top.qcow2
        rebase -b nowhere -F qcow2 top.qcow2
        rebase -u -b base.raw top.qcow2
        rebase -f raw -b base.raw -F raw short.raw
        rebase -f frob -b base.raw -F raw top.qcow2
        rebase top.qcow2
        rebase -b base.raw -F raw broken-chain.qcow2
        rebase -u -b base.raw -F raw broken-chain.qcow2
        rebase -b base.raw -F raw base.qcow2
        rebase -c -b base.qcow2 -F qcow2 top.qcow2
        rebase -b base.raw -F raw nowhere
    """,
    "resize": """
        resize base.qcow2 2M
        resize -f qcow2 base.qcow2 +1M
        resize -q -f qcow2 base.qcow2 +1M
        resize -f qcow2 base.qcow2 512k
        resize -f qcow2 --shrink base.qcow2 512k
        resize -f qcow2 --shrink base.qcow2 -512k
        resize -f qcow2 base.qcow2 -512k
        resize -f qcow2 --shrink base.qcow2 -5M
        resize -f qcow2 base.qcow2 1M
        resize -f qcow2 --preallocation=off base.qcow2 2M
        resize -f qcow2 --preallocation=metadata base.qcow2 2M
        resize -f qcow2 --preallocation=frob base.qcow2 2M
        resize -f qcow2 --preallocation=metadata --shrink base.qcow2 512k
        resize -f raw --preallocation=falloc base.raw 2M
        resize -f raw --preallocation=full base.raw 2M
        resize -f raw --preallocation=metadata base.raw 2M
        resize -f raw base.raw 1000001
        resize -f raw --shrink base.raw 1000001
        resize base.raw 2M
        resize --image-opts driver=qcow2,file.filename=base.qcow2 2M
        resize --object secret,id=s,data=x -f qcow2 base.qcow2 2M
        resize -f frob base.qcow2 2M
        resize snap.qcow2 2M
        resize --shrink snap.qcow2 512k
        resize v2.qcow2 2M
        resize bits.qcow2 2M
        resize --shrink bits.qcow2 512k
        resize data.qcow2 2M
        resize mid.qcow2 2M
        resize base.qcow2 x
        resize base.qcow2
        resize nowhere 2M
        resize base.qcow2 2M 3M
        resize 2M
        resize base.qcow2 9E
        resize broken-chain.qcow2 2M
    """,
    "snapshot": """
        snapshot snap.qcow2
        snapshot -c s3 snap.qcow2
        snapshot -q -c s3 snap.qcow2
        snapshot -c s1 snap.qcow2
        snapshot -a s1 snap.qcow2
        snapshot -a 2 snap.qcow2
        snapshot -a nosuch snap.qcow2
        snapshot -d s1 snap.qcow2
        snapshot -d nosuch snap.qcow2
        snapshot --image-opts -c s3 driver=qcow2,file.filename=snap.qcow2
        snapshot --image-opts -a s1 driver=qcow2,file.filename=snap.qcow2
        snapshot --image-opts -d s1 driver=qcow2,file.filename=snap.qcow2
        snapshot -U -c s3 snap.qcow2
        snapshot -U -d s1 snap.qcow2
        snapshot -c s3 base.raw
        snapshot -d s3 base.raw
        snapshot -a s3 base.raw
        snapshot -c s3 v2.qcow2
        snapshot -c s3 top.qcow2
        snapshot -c s3 data.qcow2
        snapshot -c s3 nowhere
        snapshot -c s3
    """,
}


class Fixtures:
    """Images of every kind, made once, by qemu-img but for those with a password: it measures for
    how long it would have to count, and fails where the machine is busy."""

    def __init__(self, case):
        self.case = case
        self.folder = tempfile.mkdtemp(prefix="minivmm-options-")
        self.plain()
        self.chains()
        self.encrypted()
        self.damage()

    def path(self, name):
        return os.path.join(self.folder, name)

    def run(self, *words):
        self.case.must(self.case.theirs(*words, folder=self.folder))

    def io(self, name, *commands):
        words = [word for command in commands for word in ("-c", command)]
        self.case.must(self.case.run_in(self.folder, "qemu-io", "-f", "qcow2", *words, name))

    def plain(self):
        with open(self.path("base.raw"), "wb") as file:
            file.truncate(1 << 20)
            for at, byte, length in ((0, 1, 70_000), (200_000, 2, 4096), (600_000, 3, 200_000)):
                file.seek(at)
                file.write(bytes([byte]) * length)
            file.seek(900_000)
            file.write(bytes(20_000))
        with open(self.path("odd.raw"), "wb") as file:
            file.write(b"x" * 1300)
        with open(self.path("empty.raw"), "wb"):
            pass
        shutil.copy(self.path("base.raw"), self.path("short.raw"))
        os.truncate(self.path("short.raw"), 700_000)
        for name, options in (("base", "compat=1.1"), ("v2", "compat=0.10"),
                              ("ext", "extended_l2=on"), ("zstd", "compression_type=zstd"),
                              ("data", "data_file=data.bin"), ("snap", "cluster_size=4k"),
                              ("bits", "cluster_size=64k"), ("leaky", "cluster_size=64k"),
                              ("dirty", "lazy_refcounts=on"), ("corrupt", "cluster_size=64k"),
                              ("compressed", "cluster_size=64k")):
            compress = ["-c"] if name in ("zstd", "compressed") else []
            self.run("convert", "-f", "raw", "base.raw", "-O", "qcow2", *compress, "-o", options,
                     f"{name}.qcow2")
        for name in ("s1", "s2"):
            self.run("snapshot", "-c", name, "snap.qcow2")
            self.io("snap.qcow2", "write -P 5 0 100k")
        self.run("bitmap", "--add", "bits.qcow2", "b0")
        self.run("bitmap", "--add", "--disable", "-g", "4k", "bits.qcow2", "b1")

    def chains(self):
        create = ["create", "-q", "-f", "qcow2"]
        self.run(*create, "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
        self.run(*create, "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "2M")
        self.io("mid.qcow2", "write -P 9 300k 64k", "write -z 640k 64k")
        self.io("top.qcow2", "write -P 8 340k 10k", "write -P 7 1500k 70k")
        self.run(*create, "-u", "-b", "nowhere", "-F", "raw", "broken-chain.qcow2", "1M")
        self.run(*create, "loop.qcow2", "1M")
        self.run("rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2", "loop.qcow2")

    def encrypted(self):
        for name, fmt, prefix in (("luks.img", "luks", ""), ("crypt.qcow2", "qcow2", "encrypt.")):
            options = f"{prefix}key-secret=s,{prefix}iter-time=10"
            if prefix:
                options += ",encrypt.format=luks"
            self.case.must(self.case.ours(
                "convert", "--object", "secret,id=s,data=geheim", "-f", "raw", "-O", fmt, "-o",
                options, "base.raw", name, folder=self.folder))

    def damage(self):
        # Two clusters at the end of the file that are counted and that nothing refers to.
        with open(self.path("leaky.qcow2"), "r+b") as file:
            file.seek(48)
            table = struct.unpack(">Q", file.read(8))[0]
            file.seek(table)
            block = struct.unpack(">Q", file.read(8))[0]
            end = file.seek(0, 2) // 65536
            file.truncate((end + 2) * 65536)
            file.seek(block + 2 * end)
            file.write(struct.pack(">HH", 1, 1))
        for name, bit in (("dirty", 1), ("corrupt", 2)):
            with open(self.path(f"{name}.qcow2"), "r+b") as file:
                file.seek(79)
                file.write(bytes([bit]))

    def needed(self, words):
        """The files that a row is about, with those that they name."""
        below = {"top.qcow2": ["mid.qcow2", "base.qcow2"], "mid.qcow2": ["base.qcow2"],
                 "data.qcow2": ["data.bin"]}
        out = {name for name in os.listdir(self.folder) if name in " ".join(words)}
        for name in list(out):
            out.update(below.get(name, []))
        return out


def rows(table):
    for line in table.strip().splitlines():
        yield ["" if word == "''" else word for word in line.split()]


def told(done):
    """What is compared: times differ, of course."""
    out = re.sub(r"Run completed in \d+\.\d{3} seconds", "Run completed", done.out)
    # How often the progress is printed depends on the time.
    out = re.sub(r"(    \(\d+\.\d\d/100%\)\r)+", "(...)\r", out)
    # QEMU counts nodes as it likes.
    err = re.sub(r"#block\d+", "#block", done.err)
    return f"status {done.status}\n--- out\n{out}\n--- err\n{err}"


class Options(ImageCase):
    @classmethod
    def setUpClass(cls):
        case = cls()
        case.folder = tempfile.mkdtemp(prefix="minivmm-options-")
        cls.addClassCleanup(shutil.rmtree, case.folder)
        cls.made = Fixtures(case)
        cls.addClassCleanup(shutil.rmtree, cls.made.folder)

    def in_parallel(self, work, table):
        self.drop_in("--version")  # the link is there before anybody needs it
        lines = list(rows(table))
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for words, (ours, theirs) in zip(lines, pool.map(work, lines)):
                line = " ".join(words)
                with self.subTest(words=line):
                    if line in DIFFERS:
                        self.assertNotEqual(ours, theirs)
                    elif "is required for cipher" in theirs:  # and then what it is
                        self.assertTrue(ours.startswith(theirs.rstrip()), f"{ours}\n{theirs}")
                    else:
                        self.assertEqual(ours, theirs)

    def one_read(self, words):
        return [told(run(*words, folder=self.made.folder)) for run in (self.drop_in, self.theirs)]

    def one_write(self, words):
        folders = [tempfile.mkdtemp(dir=self.folder) for _ in range(2)]
        needed = self.made.needed(words)
        for folder in folders:
            for name in needed:
                shutil.copy(self.made.path(name), folder)
        answers = [told(run(*words, folder=folder))
                   for run, folder in zip((self.drop_in, self.theirs), folders)]
        changed = [set(self.changed(folder)) for folder in folders]
        if not answers[0].startswith("status 0"):
            # What failed leaves nothing behind here. There it may.
            changed = [changed[0]] * 2
        for number, folder in enumerate(folders):
            for name in sorted(changed[0] | changed[1]):
                answers[number] += self.described(folder, name)
        for name in changed[0] & changed[1]:
            paths = [os.path.join(folder, name) for folder in folders]
            if not self.comparable(paths[0]):
                continue
            compared = self.theirs("compare", "-U", *paths)
            if compared.status != 0:
                answers[0] += f"{name}: {compared}"
        for folder in folders:
            shutil.rmtree(folder)
        return answers

    def changed(self, folder):
        for name in os.listdir(folder):
            before, after = self.made.path(name), os.path.join(folder, name)
            if not os.path.exists(before) or not filecmp.cmp(before, after, shallow=False):
                yield name

    def comparable(self, path):
        """It can be opened by its name alone."""
        with open(path, "rb") as file:
            beginning = file.read(1 << 10)
        if any(name in beginning for name in (b"out.bin", b"data.bin", b"other.bin")):
            return False
        return b"nowhere" not in beginning and b"encrypt" not in beginning and \
            not beginning.startswith(b"LUKS") and beginning[32:36] in (b"\0\0\0\0", b"")

    def described(self, folder, name):
        if not os.path.exists(os.path.join(folder, name)):
            return f"\n--- no {name}"
        done = self.theirs("info", "-U", "--output=json", name, folder=folder)
        facts = json.loads(done.out) if done.status == 0 else {}
        for key in ("actual-size", "snapshots"):
            facts.pop(key, None)
        secret = facts.get("format") == "luks" or facts.pop("encrypted", False)
        if secret:
            facts.pop("format-specific", None)
        out = f"\n--- {name}\n{json.dumps(facts, indent=1)}"
        if facts.get("format") == "qcow2" and not secret:
            out += f"\ncheck: {self.theirs('check', '-U', name, folder=folder).status}"
        return out


def add_tests():
    for group, table in READS.items():
        name = re.sub(r"\W+", "_", group)
        setattr(Options, f"test_reading_{name}",
                lambda self, table=table: self.in_parallel(self.one_read, table))
    for group, table in WRITES.items():
        name = re.sub(r"\W+", "_", group)
        setattr(Options, f"test_writing_{name}",
                lambda self, table=table: self.in_parallel(self.one_write, table))


add_tests()

if __name__ == "__main__":
    main()

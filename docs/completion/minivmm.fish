# SPDX-License-Identifier: Apache-2.0
# Completion of `minivmm` for fish.

# True if the line's command is one of those named; "image-create" is `image create`.
function __minivmm_in
    set -l words (commandline -opc)
    set -l command $words[2]
    if test "$command" = image; and set -q words[3]
        set command image-$words[3]
    end
    contains -- "$command" $argv
end

# `image` and its commands: their options have texts of their own.
function __minivmm_in_image
    set -l words (commandline -opc)
    test "$words[2]" = image; and set -q words[3]
end

# The keys that may follow the last comma of the word.
function __minivmm_keys
    set -l word (commandline -ct)
    set -l before (string replace -r -- '^--[a-z-]+=' '' $word | string replace -r '[^,]*$' '')
    if test -z "$before"
        __fish_complete_path (string replace -r -- '^--[a-z-]+=' '' $word)
        return
    end
    for key in $argv
        echo $before$key
    end
end

complete -c minivmm -n "__fish_use_subcommand" -f -a boot -d "Run a guest on disks, and serve them"
complete -c minivmm -n "__fish_use_subcommand" -f -a serve -d "Serve disks over NBD and FUSE"
complete -c minivmm -n "__fish_use_subcommand" -f -a image -d "Create, inspect and check disk images"
complete -c minivmm -n "__fish_use_subcommand" -f -a check-host -d "What this machine offers"
complete -c minivmm -n "__fish_use_subcommand" -s V -l version -d "Show the version"
complete -c minivmm -n "not __minivmm_in_image" -s h -l help -d "Show the options"

complete -c minivmm -n "__minivmm_in boot" -l kernel -r -d "ELF or bzImage kernel"
complete -c minivmm -n "__minivmm_in boot" -l initrd -r -d "Initial ramdisk"
complete -c minivmm -n "__minivmm_in boot" -l append -x -d "Command line of the kernel"
complete -c minivmm -n "__minivmm_in boot" -l memory -x -d "Guest RAM"
complete -c minivmm -n "__minivmm_in boot" -l cpus -x -d "Virtual CPUs"
complete -c minivmm -n "__minivmm_in boot" -l shared-memory -d "Guest RAM in a memfd"
complete -c minivmm -n "__minivmm_in boot" -l serial -x -a "stdio none file:" -d "Serial port of the guest"

complete -c minivmm -n "__minivmm_in boot serve" -l disk -x -a "(__minivmm_keys id= format=qcow2 format=raw ro readonly cache=writeback cache=none cache=writethrough cache=directsync cache=unsafe backing= backing_fmt=qcow2 backing_fmt=raw offset= size= serial= logical_block_size= physical_block_size= num-queues= queue-size= cache-size= l2-cache-size= refcount-cache-size= l2-cache-entry-size= locking=auto locking=on locking=off)" -d "Disk image"
complete -c minivmm -n "__minivmm_in boot serve" -l blockdev -x -d "Node by QEMU's options"
complete -c minivmm -n "__minivmm_in boot serve" -l object -x -a "secret,id=" -d "Password or key by an id"
complete -c minivmm -n "__minivmm_in boot serve" -l backing-root -x -a "(__fish_complete_directories)" -d "Where backing files may lie"
complete -c minivmm -n "__minivmm_in boot serve" -l nbd -x -a "nbd://127.0.0.1 nbd+unix:///?socket= fd: systemd" -d "Listen for NBD clients"
complete -c minivmm -n "__minivmm_in boot serve" -l nbd-allow-remote -d "Listen beyond loopback"
complete -c minivmm -n "__minivmm_in boot serve" -l fuse -x -a "(__minivmm_keys mode= uid= gid= allow_other)" -d "Mount a directory with the exports"
complete -c minivmm -n "__minivmm_in boot serve" -l export -x -a "(__minivmm_keys name= description= writable nbd fuse)" -d "Publish a node"
complete -c minivmm -n "__minivmm_in boot serve" -l io-threads -x -d "Event loops"
complete -c minivmm -n "__minivmm_in boot serve" -l io-backend -x -a "auto io_uring epoll" -d "How I/O is done"
complete -c minivmm -n "__minivmm_in boot serve" -l ready-fd -x -d "Descriptor that is told READY"
complete -c minivmm -n "__minivmm_in boot serve" -l pid-file -r -d "File for the process id"
complete -c minivmm -n "__minivmm_in boot serve" -l shutdown-timeout -x -d "How long an end may take"
complete -c minivmm -n "__minivmm_in boot serve" -l log-level -x -a "debug info warning error off" -d "What is logged"

complete -c minivmm -n "__minivmm_in check-host" -l output -x -a "human json" -d "Form of the output"

# --- image commands: written by docs/update-image-commands ---
complete -c minivmm -n "__minivmm_in image" -f -a "create info check"
complete -c minivmm -n "__minivmm_in image-create" -s f -l format -x -a "qcow2 raw" -d "qcow2 or raw"
complete -c minivmm -n "__minivmm_in image-create" -s b -l backing -r -d "the backing file, as it is recorded"
complete -c minivmm -n "__minivmm_in image-create" -s F -l backing-format -x -a "qcow2 raw" -d "the backing file's format"
complete -c minivmm -n "__minivmm_in image-create" -s u -l unsafe -d "record the backing file without looking at it"
complete -c minivmm -n "__minivmm_in image-create" -s o -l options -x -d "options of the format"
complete -c minivmm -n "__minivmm_in image-create" -s q -l quiet -d "print nothing but errors"
complete -c minivmm -n "__minivmm_in image-create" -s h -l help -d "this text"
complete -c minivmm -n "__minivmm_in image-info" -l backing-chain -d "the backing files as well, from the image downwards"
complete -c minivmm -n "__minivmm_in image-info" -l backing-root -r -d "where backing files that images name may lie, besides the ..."
complete -c minivmm -n "__minivmm_in image-info" -s f -l format -x -a "qcow2 raw" -d "the image's format, qcow2 or raw"
complete -c minivmm -n "__minivmm_in image-info" -l output -x -a "human json" -d "what the output is for"
complete -c minivmm -n "__minivmm_in image-info" -s U -l force-share -d "read the image although somebody may be writing to it"
complete -c minivmm -n "__minivmm_in image-info" -s h -l help -d "this text"
complete -c minivmm -n "__minivmm_in image-check" -s r -l repair -x -a "leaks all" -d "not supported"
complete -c minivmm -n "__minivmm_in image-check" -s T -x -a "none writeback writethrough directsync unsafe" -d "how the file is read"
complete -c minivmm -n "__minivmm_in image-check" -s f -l format -x -a "qcow2 raw" -d "the image's format, qcow2 or raw"
complete -c minivmm -n "__minivmm_in image-check" -l output -x -a "human json" -d "what the output is for"
complete -c minivmm -n "__minivmm_in image-check" -s q -l quiet -d "print nothing but errors"
complete -c minivmm -n "__minivmm_in image-check" -s U -l force-share -d "read the image although somebody may be writing to it"
complete -c minivmm -n "__minivmm_in image-check" -s h -l help -d "this text"
# --- image commands: end ---

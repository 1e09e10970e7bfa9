# SPDX-License-Identifier: Apache-2.0
# Completion of `minivmm` for bash.

_minivmm_disk_keys="id= format= ro readonly cache= backing= backing_fmt= offset= size= serial=
  logical_block_size= physical_block_size= num-queues= queue-size= indirect_desc= event_idx= media= snapshot= legacy rerror= werror=
  cache-size= l2-cache-size=
  refcount-cache-size= l2-cache-entry-size= locking= key-secret= unlock-time=
  encrypt.key-secret="
_minivmm_export_keys="name= description= writable allow= max-connections= in-flight= nbd fuse clone clone= clone-limit= clone-total= clone-dir="
_minivmm_fuse_keys="mode= uid= gid= allow_other"

_minivmm_disks="--disk --blockdev --object --backing-root"
_minivmm_front_ends="--nbd --nbd-allow-remote --fuse --export"
_minivmm_process="--io-threads --io-backend --no-seccomp --qmp --ready-fd --pid-file --shutdown-timeout --log-level --help -h"
_minivmm_guest="--kernel --probe --initrd --append --memory --cpus --shared-memory --hugetlb --prealloc --devices --no-rng --on-reboot --pin --serial"

# --- image commands: written by docs/update-image-commands ---
_minivmm_image_commands="amend bench bitmap check commit compare convert create dd info map measure rebase resize"
_minivmm_image_options() {
  case $1 in
    amend) echo "-o --options --force -f --format -t --cache --image-opts -p --progress -q --quiet --object -h --help" ;;
    bench) echo "-c --count -d --depth -s --buffer-size -S --step-size -o --offset -w --write --pattern --flush-interval --no-drain -n --native -i --aio -f --format -t --cache --image-opts -q --quiet -U --force-share --object -h --help" ;;
    bitmap) echo "--add --remove --clear --enable --disable --merge -g --granularity -b --source-file -F --source-format -f --format --image-opts --object -h --help" ;;
    check) echo "-r --repair --untrusted --trusted --backing-root --limit-memory --limit-cpu -f --format -T --source-cache --output --image-opts -q --quiet -U --force-share --object -h --help" ;;
    commit) echo "-b --base -d --drop -r --rate --backing-root -f --format -t --cache --image-opts -p --progress -q --quiet --object -h --help" ;;
    compare) echo "-F --second-format -s --strict -f --format -T --source-cache --image-opts -p --progress -q --quiet -U --force-share --object -h --help" ;;
    convert) echo "-O --output-format -o --options -B --backing -F --backing-format -n --skip-create --target-is-zero --target-image-opts -c --compress -S --sparse -l --snapshot --bitmaps --skip-broken-bitmaps --salvage -C --copy-range -m --parallel -W --out-of-order -r --rate -f --format -t --cache -T --source-cache --image-opts -p --progress -q --quiet -U --force-share --object -h --help" ;;
    create) echo "-f --format -b --backing -F --backing-format -u --unsafe -o --options -q --quiet --object -h --help" ;;
    dd) echo "-O --output-format -f --format --image-opts -U --force-share --object -h --help" ;;
    info) echo "--backing-chain --untrusted --trusted --backing-root --limit-memory --limit-cpu -f --format --output --image-opts -U --force-share --object -h --help" ;;
    map) echo "-s --start-offset -l --max-length --svg --untrusted --trusted --backing-root --limit-memory --limit-cpu -f --format --output --image-opts -U --force-share --object -h --help" ;;
    measure) echo "-O --output-format -o --options --size -l --snapshot --untrusted --trusted --backing-root --limit-memory --limit-cpu -f --format --output --image-opts -U --force-share --object -h --help" ;;
    rebase) echo "-b --backing -F --backing-format -u --unsafe --backing-root -f --format -t --cache -T --source-cache --image-opts -p --progress -q --quiet -U --force-share --object -h --help" ;;
    resize) echo "--shrink --preallocation -f --format --image-opts -q --quiet --object -h --help" ;;
  esac
}
_minivmm_image_values() {
  case $1:$2 in
    amend:-f | amend:--format) echo "qcow2 raw luks" ;;
    amend:-t | amend:--cache) echo "none writeback writethrough directsync unsafe" ;;
    bench:-f | bench:--format) echo "qcow2 raw luks" ;;
    bench:-t | bench:--cache) echo "none writeback writethrough directsync unsafe" ;;
    bitmap:-F | bitmap:--source-format) echo "qcow2 raw luks" ;;
    bitmap:-f | bitmap:--format) echo "qcow2 raw luks" ;;
    check:-r | check:--repair) echo "leaks all" ;;
    check:-f | check:--format) echo "qcow2 raw luks" ;;
    check:-T | check:--source-cache) echo "none writeback writethrough directsync unsafe" ;;
    check:--output) echo "human json" ;;
    commit:-f | commit:--format) echo "qcow2 raw luks" ;;
    commit:-t | commit:--cache) echo "none writeback writethrough directsync unsafe" ;;
    compare:-F | compare:--second-format) echo "qcow2 raw luks" ;;
    compare:-f | compare:--format) echo "qcow2 raw luks" ;;
    compare:-T | compare:--source-cache) echo "none writeback writethrough directsync unsafe" ;;
    convert:-O | convert:--output-format) echo "qcow2 raw luks" ;;
    convert:-F | convert:--backing-format) echo "qcow2 raw luks" ;;
    convert:-f | convert:--format) echo "qcow2 raw luks" ;;
    convert:-t | convert:--cache) echo "none writeback writethrough directsync unsafe" ;;
    convert:-T | convert:--source-cache) echo "none writeback writethrough directsync unsafe" ;;
    create:-f | create:--format) echo "qcow2 raw luks" ;;
    create:-F | create:--backing-format) echo "qcow2 raw luks" ;;
    dd:-O | dd:--output-format) echo "qcow2 raw luks" ;;
    dd:-f | dd:--format) echo "qcow2 raw luks" ;;
    info:-f | info:--format) echo "qcow2 raw luks" ;;
    info:--output) echo "human json" ;;
    map:-f | map:--format) echo "qcow2 raw luks" ;;
    map:--output) echo "human json" ;;
    measure:-O | measure:--output-format) echo "qcow2 raw luks" ;;
    measure:-f | measure:--format) echo "qcow2 raw luks" ;;
    measure:--output) echo "human json" ;;
    rebase:-F | rebase:--backing-format) echo "qcow2 raw luks" ;;
    rebase:-f | rebase:--format) echo "qcow2 raw luks" ;;
    rebase:-t | rebase:--cache) echo "none writeback writethrough directsync unsafe" ;;
    rebase:-T | rebase:--source-cache) echo "none writeback writethrough directsync unsafe" ;;
    resize:--preallocation) echo "off metadata falloc full" ;;
    resize:-f | resize:--format) echo "qcow2 raw luks" ;;
  esac
}
# --- image commands: end ---

# --- nbd commands: written by docs/update-image-commands ---
_minivmm_nbd_commands="connect info list"
_minivmm_nbd_options() {
  case $1 in
    connect) echo "-N --export-name -C --connections -b --block-size -t --timeout -R --read-only -p --persist --hold --object --tls-creds --tls-hostname -h --help" ;;
    info) echo "--json --size --map --context --totals --can --is --object --tls-creds --tls-hostname -h --help" ;;
    list) echo "-l --long --json --object --tls-creds --tls-hostname -h --help" ;;
  esac
}
_minivmm_nbd_values() {
  case $1:$2 in
  esac
}
# --- nbd commands: end ---

# The options of a command, as its --help has them.
_minivmm_options() {
  case $1 in
    boot) echo "$_minivmm_guest $_minivmm_disks $_minivmm_front_ends $_minivmm_process" ;;
    serve) echo "--once --persistent $_minivmm_disks $_minivmm_front_ends $_minivmm_process" ;;
    control) echo "--events --compact --timeout --help -h" ;;
    check-host) echo "--output --help -h" ;;
    image | nbd) echo "--help -h" ;;
    "image "*) _minivmm_image_options "${1#image }" ;;
    "nbd "*) _minivmm_nbd_options "${1#nbd }" ;;
    *) echo "--help -h --version -V" ;;
  esac
}

# PATH,KEY=VALUE,...: the path, then keys, then the values that are known.
_minivmm_keyed() {
  local cur=$1 keys=$2 first=$3 before part
  if [[ $cur != *,* ]]; then
    case $first in
      file) compopt -o filenames -o nospace 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
      directory) compopt -o filenames -o nospace 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$cur") ;;
      node) mapfile -t COMPREPLY < <(compgen -W "$(_minivmm_nodes)" -- "$cur") ;;
    esac
    return
  fi
  before="${cur%,*}," part=${cur##*,}
  compopt -o nospace 2>/dev/null
  local values=
  case $part in
    format=* | backing_fmt=*) values="qcow2 raw" ;;
    cache=*) values="writeback none writethrough directsync unsafe" ;;
    locking=*) values="auto on off" ;;
    backing=*)
      mapfile -t COMPREPLY < <(compgen -P "${before}backing=" -f -- "${part#*=}")
      return ;;
    *=*) return ;;
    *) mapfile -t COMPREPLY < <(compgen -P "$before" -W "$keys" -- "$part"); return ;;
  esac
  mapfile -t COMPREPLY < <(compgen -P "$before${part%%=*}=" -W "$values" -- "${part#*=}")
}

# The names of the nodes that the line so far makes: the id= of each --disk, or disk0, disk1, ...
_minivmm_nodes() {
  local i number=0 value
  for ((i = 1; i < ${#words[@]} - 1; i++)); do
    value=
    [[ ${words[i]} == --disk && $((i + 1)) -lt ${#words[@]} ]] && value=${words[i + 1]}
    [[ ${words[i]} == --disk=* ]] && value=${words[i]#--disk=}
    [[ -n $value ]] || continue
    if [[ ,$value =~ ,id=([^,]*) ]]; then echo "${BASH_REMATCH[1]}"; else echo "disk$number"; fi
    number=$((number + 1))
  done
}

_minivmm() {
  local cur prev command i
  local -a words
  # Our own split: bash would also cut at each '=' and ':'.
  local line=${COMP_LINE:0:COMP_POINT}
  read -ra words <<<"$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  cur=${words[-1]} prev=
  ((${#words[@]} > 1)) && prev=${words[-2]}
  COMPREPLY=()

  command=
  ((${#words[@]} > 2)) && command=${words[1]}
  [[ $command == image || $command == nbd ]] && ((${#words[@]} > 3)) && command+=" ${words[2]}"
  if [[ $cur == --*=* ]]; then
    prev=${cur%%=*} cur=${cur#*=}
  elif [[ $cur == -* ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$(_minivmm_options "$command")" -- "$cur")
    return
  fi

  local words_for=
  case $command in
    "") words_for="boot serve image nbd control check-host" prev= ;;
    image) words_for=$_minivmm_image_commands prev= ;;
    nbd) words_for=$_minivmm_nbd_commands prev= ;;
  esac
  case $command:$prev in
    *:--disk) _minivmm_keyed "$cur" "$_minivmm_disk_keys" file ;;
    *:--fuse) _minivmm_keyed "$cur" "$_minivmm_fuse_keys" directory ;;
    *:--export) _minivmm_keyed "$cur" "$_minivmm_export_keys" node ;;
    *:--nbd)
      words_for="nbd://127.0.0.1 nbd+unix:///?socket= fd: systemd"
      compopt -o nospace 2>/dev/null ;;
    boot:--object | serve:--object)
      words_for="secret,id= tls-creds-x509,id= tls-creds-psk,id="; compopt -o nospace 2>/dev/null ;;
    *:--blockdev) words_for="driver="; compopt -o nospace 2>/dev/null ;;
    *:--qmp) words_for="unix:"; compopt -o nospace 2>/dev/null ;;
    *:--io-backend) words_for="auto io_uring epoll" ;;
    *:--log-level) words_for="debug info warning error off" ;;
    *:--serial) words_for="stdio none pty file: unix:" ;;
    *:--on-reboot) words_for="exit restart" ;;
    check-host:--output) words_for="human json" ;;
    boot:--backing-root | serve:--backing-root)
      compopt -o filenames 2>/dev/null
      mapfile -t COMPREPLY < <(compgen -d -- "$cur") ;;
    *:--append | *:--memory | *:--cpus | *:--io-threads | *:--ready-fd | *:--shutdown-timeout) ;;
    image\ *:-?*)
      words_for=$(_minivmm_image_values "${command#image }" "$prev")
      if [[ -z $words_for ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      fi ;;
    nbd\ *:-?*) ;;
    nbd\ *) words_for="nbd:// nbd+unix:///?socket= /dev/nbd"; compopt -o nospace 2>/dev/null ;;
    control:--timeout) ;;
    control:control | *:--kernel | *:--initrd | *:--pid-file | image\ *)
      compopt -o filenames 2>/dev/null
      mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
  esac
  [[ -z $words_for ]] || mapfile -t COMPREPLY < <(compgen -W "$words_for" -- "$cur")
  # What lies before the last break is not replaced by readline.
  if [[ $cur == *[=:]* ]]; then
    local head=${cur%"${cur##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
  fi
}

complete -F _minivmm minivmm

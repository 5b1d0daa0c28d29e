#!/bin/bash
# From a bare Ubuntu machine with an NVIDIA driver to a running recipe, and on from where it stopped, here or elsewhere
# (docs/one_gpu.md). From a clone of this repository:
#   bash infra/one_gpu.sh s3://bucket/prefix sfd-full --recipe demo
# ROOT is where artifacts live, the rest is what `flows run` takes. PRICE is the machine's, in dollars an hour, for the
# plan; PLAN_ONLY=1 ends after it. GPU and CPUs are counted here, so no option says them.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
work=.latentforge/one_gpu
mkdir -p "$work"

refuse() { echo "error: $*" >&2; exit 1; }
[ $# -ge 2 ] || refuse "give a root and a flow: bash infra/one_gpu.sh s3://bucket/prefix sfd-full --recipe demo"
root=$1 flow=$2
shift 2

follow() {    # until the run of that process ends; Ctrl-C leaves it running
  tail -n +1 -f --pid="$1" "$work/run.log" || true
  [ -f "$work/status" ] || refuse "the run ended without a word: the same command goes on where it stopped"
  exit "$(cat "$work/status")"
}

goes_on() {    # and is ours: after a restart of the machine its number may be anybody's
  [ -f "$work/pid" ] || return 1
  tr '\0' ' ' 2> /dev/null < "/proc/$(cat "$work/pid")/cmdline" | grep "latentforge run " > /dev/null
}

if goes_on; then
  echo "a run goes on here already (process $(cat "$work/pid")): following it"
  follow "$(cat "$work/pid")"
fi

# ---- what this machine is, before anything is fetched
command -v nvidia-smi > /dev/null ||
  refuse "no NVIDIA driver: sudo apt-get install nvidia-driver-580-server, restart, and run this again"
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1) ||
  refuse "0 GPUs visible: nvidia-smi fails; restart the machine, or rent another"
name=${gpu%%, *} driver=${gpu##*, }
[ "${driver%%.*}" -ge 580 ] || refuse "driver $driver is older than 580, which CUDA 13 needs: rent an image with a newer one"
free=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
[ "$free" -ge 25 ] || refuse "$free GB free in $here: the environment and its caches take 25"
case $root in
  s3://*) [ -n "${AWS_ACCESS_KEY_ID:-}" ] || [ -f ~/.aws/credentials ] ||
    echo "note: neither AWS_ACCESS_KEY_ID nor ~/.aws/credentials is there: the machine's own role has to open $root" ;;
  *) echo "note: $root is a folder of this machine: what is made goes with it, and no other machine goes on from it" ;;
esac

# ---- the environment, from pinned versions; nothing to do the second time
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
if ! command -v g++ > /dev/null || ! command -v make > /dev/null || ! python3 -m ensurepip --version > /dev/null 2>&1; then
  as_root apt-get update -qq
  as_root apt-get install -y -qq build-essential python3-venv
fi
python=$(command -v python3.11 || true)
if [ -z "$python" ] && [ ! -x .venv/bin/python ]; then
  [ -x "$work/uv/bin/uv" ] || { python3 -m venv "$work/uv" && "$work/uv/bin/pip" install -q uv; }
  "$work/uv/bin/uv" python install -q 3.11
  python=$("$work/uv/bin/uv" python find 3.11)
fi
make -s .venv/.ready ${python:+PYTHON="$python"}
.venv/bin/python -m infra.gpus 1

# ---- the plan, for this machine
peaks() { printf 'gpu: "%s", bf16_tflops: %s, fp32_tflops: %s' "$name" "$1" "$2"; }    # dense, of data sheets
case $name in
  *H100*PCIe*) peak=$(peaks 756.0 51.0) ;;
  *H100* | *H200* | *GH200*) peak=$(peaks 989.0 67.0) ;;
  *A100*) peak=$(peaks 312.0 19.5) ;;
  *L40S*) peak=$(peaks 362.0 91.6) ;;
  *L4*) peak=$(peaks 121.0 30.3) ;;
  *A10*) peak=$(peaks 125.0 31.2) ;;
  *4090*) peak=$(peaks 165.2 82.6) ;;
  *) peak="machine: \"$name\"" && echo "note: the peaks of $name are not written down here: the plan's times are an H100's" ;;
esac
cpus=$(nproc)
printf 'extends: one_gpu\npools: {head: {cpus: %s, %s%s}}\n' "$cpus" "$peak" "${PRICE:+, dollars_per_hour: $PRICE}" \
  > "$work/here.yaml"
here_only=(--set compute.train.workers=1 --set compute.train.gpus_per_worker=1
  --set "compute.train.cpus_per_worker=$((cpus < 8 ? cpus : 8))" --set compute.actors.actors=1
  --set compute.actors.gpus_per_actor=1 --set compute.actors.cpus_per_actor=1)
.venv/bin/python -m latentforge plan "$flow" "${here_only[@]}" "$@" --cluster "$work/here.yaml"
[ -z "${PLAN_ONLY:-}" ] || exit 0

# ---- the run, which outlives this terminal
rm -f "$work/status"
: > "$work/run.log"    # there before anybody follows it
setsid nohup bash -c '"$@"; echo $? > '"$work"'/status' run \
  .venv/bin/python -m latentforge run "$flow" "${here_only[@]}" "$@" --root "$root" >> "$work/run.log" 2>&1 < /dev/null &
echo $! > "$work/pid"
echo "running as process $!: Ctrl-C ends only this view, $here/$work/run.log goes on"
follow $!

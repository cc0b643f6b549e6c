#!/usr/bin/env bash
# install_packages.sh [LIST]: installs what tools/packages.txt, or LIST beside it, names and is not there yet. Asks
# nothing; when all is there it takes no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

mapfile -t wanted < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "${1:-packages.txt}")

if ! command -v dpkg-query >/dev/null; then
  echo "install_packages: this is not Debian, so nothing was installed: tools/${1:-packages.txt} says what is needed." >&2
  exit 0
fi

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query --show --showformat '${db:Status-Status}\n' "$package" 2>/dev/null || true)
  [[ $status == *installed* && $status != *not-installed* ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

# sudo empties the environment, so what apt must know goes in by name.
environment=(DEBIAN_FRONTEND=noninteractive)
for name in http_proxy https_proxy no_proxy; do
  [[ -z ${!name:-} ]] || environment+=("$name=${!name}")
done
if ((EUID == 0)); then
  as_root=(env "${environment[@]}")
elif command -v sudo >/dev/null; then
  # Without a terminal nobody could type a password: fail at once instead of waiting.
  as_root=(sudo)
  [[ -t 0 ]] || as_root+=(--non-interactive)
  as_root+=(env "${environment[@]}")
else
  echo "install_packages: missing ${missing[*]}; run this as root, or install sudo, and try again." >&2
  exit 1
fi

echo "install_packages: installing ${missing[*]}" >&2
apt_options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=600)
if ! "${as_root[@]}" apt-get "${apt_options[@]}" update ||
  ! "${as_root[@]}" apt-get "${apt_options[@]}" install --yes --no-install-recommends "${missing[@]}"; then
  echo "install_packages: apt-get could not install ${missing[*]}; its message above says why." >&2
  exit 1
fi

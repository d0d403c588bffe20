#!/usr/bin/env bash
# What the tests of remote tiers and certificates need from the system: a Valkey or Redis server, the libraries of
# Mooncake, openssl. Without them those tests are skipped.
#
#   scripts/servers.sh             installs what is missing from Debian's or Ubuntu's packages, as root or through sudo
#   scripts/servers.sh --missing   prints the names of the missing packages, if any, on one line
set -euo pipefail

wanted=()
command -v valkey-server >/dev/null || command -v redis-server >/dev/null || wanted+=(redis-server)
command -v openssl >/dev/null || wanted+=(openssl)
libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null || true)
for pair in libibverbs.so.1:libibverbs1 libnuma.so.1:libnuma1 libcurl.so.4:libcurl4; do
  grep -qF "${pair%:*}" <<<"$libraries" || wanted+=("${pair#*:}")
done

case "${1:-}" in
  "") ;;
  --missing) echo "${wanted[*]}"; exit ;;
  *) echo "servers: no option '$1'; the only one is --missing" >&2; exit 2 ;;
esac
[ ${#wanted[@]} -gt 0 ] || exit 0
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
if ! command -v apt-get >/dev/null || { [ ${#as_root[@]} -gt 0 ] && ! command -v sudo >/dev/null; }; then
  echo "servers: needs root and apt-get; install by hand what Debian calls: ${wanted[*]}" >&2
  exit 1
fi
options=(-qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
echo "servers: installing ${wanted[*]}"
${as_root[@]+"${as_root[@]}"} apt-get "${options[@]}" update >/dev/null || echo "servers: the package lists stay as they are" >&2
for package in "${wanted[@]}"; do  # one by one: a release may lack or rename one of them
  ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
    apt-get "${options[@]}" install -y --no-install-recommends "$package" >/dev/null ||
    { echo "servers: no package $package; its tests will be skipped" >&2; failed=1; }
done
exit "${failed:-0}"

#!/usr/bin/env bash
# The browser of tests/reporting, from the distribution. Installed already: returns at once. Where it cannot be had, says
# so and goes on: the tests that need it are skipped.
#
#     bash tests/reporting/install.sh
set -uo pipefail

for command in chromium chromium-browser google-chrome; do
    command -v "$command" >/dev/null && exit 0
done
if ((EUID)) || ! command -v apt-get >/dev/null; then
    echo "tests/reporting: no Chromium; the tests in a browser are skipped. As root: apt-get install chromium" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q && apt-get install -q -y --no-install-recommends chromium ||
    echo "tests/reporting: Chromium could not be installed; the tests in a browser are skipped" >&2

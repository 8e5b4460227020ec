"""Runs pip-audit, given as the arguments, and says what it could not check.

pip-audit ends with 0 where its service knows none of the packages, as behind a mirror without vulnerability data.
Exit code: 1 for a finding or a mistake in the call; 0 otherwise, also where no service answers.
"""

import json
import subprocess
import sys


def main(command: list[str]) -> int:
    """Run the command, which prints pip-audit's JSON, and print a line per finding and the summary."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(process.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (process.stderr.strip().splitlines() or [f"no output, exit code {process.returncode}"])[-1]
        unreachable = "ConnectionError" in last or "Timeout" in last
        print(f"{'NOT AUDITED, no vulnerability service answers' if unreachable else 'pip-audit failed'}: {last}")
        return 0 if unreachable else 1
    findings = [(package, each) for package in packages for each in package.get("vulns", ())]
    for package, each in findings:
        fixed = ", ".join(each["fix_versions"]) or "no release"
        print(f"{package['name']} {package['version']}: {each['id']}, fixed in {fixed}")
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    audited = len(packages) - len(unknown)
    if not audited:
        print(f"NOT AUDITED: the vulnerability service knows none of the {len(packages)} packages")
        return 0
    print(f"{audited} packages audited, {len(findings)} known vulnerabilities")
    if unknown:
        print(f"NOT AUDITED, unknown to the vulnerability service: {', '.join(unknown)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

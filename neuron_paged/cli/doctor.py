# SPDX-License-Identifier: Apache-2.0
"""Show versions, devices and the backend a run would use; exit code 1 if something is broken."""

import argparse
from typing import Any

from neuron_paged.cli.output import check_json_target, write_json
from neuron_paged.collect_env import collect_env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `neuron-paged doctor`."""
    parser.add_argument("--json", metavar="FILE", help='write the report as JSON ("-": to standard output)')


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    check_json_target(args.json)
    report = collect_env()
    if args.json != "-":
        print(_readable(report))
    write_json(args.json, report)
    return 1 if report["problems"] else 0


def _readable(report: dict[str, Any]) -> str:
    def versions(packages: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {installed or '(not installed)'}" for name, installed in packages.items())

    memory = report["memory_gib"]
    lines = [
        ("neuron-paged", f"{report['neuron_paged']} in {report['location']}"),
        ("python", f"{report['python']} on {report['platform']}"),
        ("machine", report["instance_type"] or "not recognised as an EC2 instance"),
        ("cpu", f"{report['cpus']} x {report['cpu']}" + (f", {memory} GiB memory" if memory else "")),
        ("packages", versions(report["packages"])),
        ("neuron packages", versions(report["neuron_packages"])),
        ("neuron system", versions(report["neuron_system"])),
        ("neuron devices", ", ".join(report["neuron_devices"]) or "none"),
        ("backend", f"{report['backend']['name']} ({report['backend']['reason']})"),
        *(("environment", f"{name}={value}") for name, value in report["environment"].items()),
        *(("PROBLEM", problem) for problem in report["problems"]),
    ]
    return "\n".join(f"{label + ':':<17}{text}" for label, text in lines)

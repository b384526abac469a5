"""python limit.py SECONDS LOG command ...: runs a command that may not take longer.

When the time is up it is ended, and by their ids all that it has started: torchrun's ranks have a
session of their own and would keep the card's memory. The exit status is the command's, or 124."""

import signal
import subprocess
import sys

import psutil

seconds, log, *command = sys.argv[1:]
with open(log, "ab") as file:
    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        sys.exit(process.wait(float(seconds)))
    except subprocess.TimeoutExpired:
        pass
started = psutil.Process(process.pid).children(recursive=True)
process.send_signal(signal.SIGTERM)
try:
    process.wait(12)
except subprocess.TimeoutExpired:
    process.kill()
for child in started:
    try:
        child.kill()
    except psutil.NoSuchProcess:
        pass
sys.exit(124)

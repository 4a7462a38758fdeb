# Runs the script of the job. Its output goes to the second serial port, the exit code to the third.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
exec </dev/null >/dev/ttyS2 2>&1
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
# Through a pipe, so that programs do not take the port for a person's terminal.
mkfifo /run/kvmhost.output
cat </run/kvmhost.output >/dev/ttyS1 &
output=$!
cd /job
/job/.kvmhost/script "$@" >/run/kvmhost.output 2>&1
code=$?
timeout 5 tail -s 0.1 -f --pid=$output /dev/null # not for ever: something in the background may hold the pipe
stty -F /dev/ttyS1 raw -echo # waits until all output is out
echo "exit $code" >/dev/ttyS2
stty -F /dev/ttyS2 raw -echo
echo o >/proc/sysrq-trigger # off: a reboot might not be the end
sleep 30 # it is not done at once, and the end of the first process is a panic

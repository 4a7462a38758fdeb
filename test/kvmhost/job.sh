# Runs the script of the job. Its output goes to the second serial port, our own words to the third: a beat every few seconds, for
# a host whose clock has stopped is silent, and the exit code.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
exec </dev/null >/dev/ttyS1 2>&1
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
(while echo beat >/dev/ttyS2; do sleep 5; done) &
beats=$!
cd /job
/job/.kvmhost/script "$@"
code=$?
kill $beats
stty -F /dev/ttyS1 raw -echo # waits until all output is out
echo "exit $code" >/dev/ttyS2
stty -F /dev/ttyS2 raw -echo
echo b >/proc/sysrq-trigger

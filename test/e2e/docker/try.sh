#!/bin/sh
# Asks of docker what jobs ask of it, as the user of jobs and with no registry in reach: try.sh [HOST:PORT] gets an address outside of
# the VM that accepts connections. A static busybox lies beside it. It ends with the first thing that does not work. In software
# a container takes seconds to start, so there are few of them.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
outside=${1-127.0.0.1:80}
is() { [ "$2" = "$3" ] && echo "$1: right after $(cut -d' ' -f1 /proc/uptime) s" || { echo "$1: got '$2', want '$3'"; exit 1; }; }
# What has just been started needs a moment.
soon() {
	for _ in 1 2 3 4 5 6 7 8 9; do "$@" 2>/dev/null && return; sleep 1; done
	"$@"
}
fetch() { curl --max-time 20 -fsS "$1"; }
cd "$(mktemp -d)"

is "daemon" "$(docker info --format '{{.Driver}}, cgroup v{{.CgroupVersion}}{{range .Warnings}}, {{.}}{{end}}' || sudo dmesg | tail -n 30)" "overlay2, cgroup v2"

cp "$here/busybox" .
cat >Dockerfile <<'D'
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir /www && echo hello >/www/index.html
D
docker build -q -t try . >/dev/null
docker buildx version >/dev/null
is "docker build and run" "$(docker run --rm --memory 64m --cpus 1 --pids-limit 100 -v "$PWD:/data" try \
	sh -c "cat /www/index.html; cd /data; ls Dockerfile; nc -w 5 ${outside%:*} ${outside##*:} -e true && echo outside" 2>&1)" "hello
Dockerfile
outside"

cat >compose.yaml <<'C'
services:
  web:
    image: try
    command: httpd -f -p 80 -h /www
    ports: ["8080:80"]
    networks: {six: {ipv6_address: "fd00:77::77"}}
  client:
    image: try
    command: sh -c 'until wget -qO- http://web; do sleep 1; done; wget -qO- "http://[fd00:77::77]" && echo both'
    depends_on: [web]
    networks: [six]
networks:
  six: {enable_ipv6: true, ipam: {config: [{subnet: "fd00:77::/64"}]}}
C
docker compose up -d >up.log 2>&1 || { cat up.log; exit 1; }
for host in 127.0.0.1 '[::1]' "$(hostname)" '[fd00:77::77]'; do
	port=:8080; [ "$host" != '[fd00:77::77]' ] || port=
	is "http://$host$port" "$(soon fetch "http://$host$port")" hello
done
logged() { docker compose logs --no-log-prefix client | grep -o -m 1 both; }
is "by name and by IPv6 between containers" "$(soon logged)" both

if [ ! -e /run/systemd/system ]; then # the agent started docker
	is "containers beside the job" "$(ls -d /sys/fs/cgroup/flint/docker/*/ 2>&1 | wc -l), $(cat /proc/self/cgroup)" "2, 0::/flint/job"
fi

for t in iptables ip6tables; do
	case $(/usr/sbin/$t -V) in *nf_tables*) ;; *) echo "$t is not for nftables"; exit 1 ;; esac
	sudo $t -t nat -A POSTROUTING -m comment --comment try -j RETURN
	sudo $t -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT
done
sudo nft 'add table inet try; add chain inet try c { type filter hook output priority 0; }; add rule inet try c tcp dport 9 counter reject'
is nft "$(sudo nft list ruleset 2>/dev/null | grep -o -e 'chain DOCKER {' -e 'table inet try' | sort -u)" "chain DOCKER {
table inet try"
echo "docker does all that was asked of it"

# The first process of the KVM host. It mounts what a Debian machine has mounted, loads KVM, and runs the job: by itself, or
# through systemd if the file `systemd` lies beside this one.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
here=/job/.kvmhost
# Signs of life, until the machine goes down: one whose clock has stopped is silent.
(while echo beat >/dev/ttyS2; do sleep 5; done) &

mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /run
for module in kvm_amd tun vhost_net vhost_vsock; do
	modprobe "$module" || echo "kvmhost: cannot load $module"
done

if [ -e $here/systemd ]; then
	mkdir -p /run/systemd/system/kvmhost.target.wants
	cat >/run/systemd/system/kvmhost.target <<-'EOF'
		[Unit]
		Description=The machine is up and its job runs
		Requires=multi-user.target
		After=multi-user.target
		AllowIsolate=yes
	EOF
	cat >/run/systemd/system/kvmhost.service <<-EOF
		[Unit]
		Description=The job of this KVM host
		After=multi-user.target

		[Service]
		# Started is enough: the machine is up while the job runs, so that the job can wait for that.
		Type=exec
		WorkingDirectory=/job
		ExecStart=/bin/sh $here/job
	EOF
	ln -s ../kvmhost.service /run/systemd/system/kvmhost.target.wants/kvmhost.service
	exec /sbin/init --unit=kvmhost.target
fi

mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
echo '+cpuset +cpu +io +memory +pids' >/sys/fs/cgroup/cgroup.subtree_control
chown root:kvm /dev/kvm /dev/vhost-net /dev/vhost-vsock
chmod 0660 /dev/kvm /dev/vhost-net /dev/vhost-vsock
chmod 0666 /dev/net/tun
hostname kvmhost
ip link set lo up
cd /job
sh $here/job

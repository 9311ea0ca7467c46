# The same process in its new root: what a machine has mounted, then the tests.
# `modules` is set before this.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
own_modules=/lib/modules/$(uname -r)
set -e
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm "$own_modules" /var/lib/cni
mount -t devpts devpts /dev/pts
for directory in /dev/shm /run /var/lib/cni; do
	mount -t tmpfs tmpfs "$directory"
done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount --bind "$modules" "$own_modules"
ip link set lo up
set +e
uname -srv
sh /mnt/tests.sh
status=$?
# What the kernel itself found wrong.
dmesg | grep -A 40 -E '(WARNING|BUG): '
echo "$status" >/mnt/status
busybox poweroff -f

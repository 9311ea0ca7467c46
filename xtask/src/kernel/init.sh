#!/bin/busybox sh
# The first process of the virtual machine: the files of the machine that it runs on
# become its own, and what is written to them stays in memory.
/bin/busybox --install -s /bin
export PATH=/bin
fail() {
	echo "booting: $* failed"
	poweroff -f
}
mount -t proc proc /proc || fail mounting /proc
for module in /modules/*; do
	case $module in
	*.xz) xzcat "$module" >/module && insmod /module || fail loading "$module" ;;
	*) insmod "$module" || fail loading "$module" ;;
	esac
done
options=trans=virtio,version=9p2000.L,msize=1048576
mount -t 9p -o "ro,cache=loose,$options" host /host || fail mounting this machine\'s files
mount -t tmpfs tmpfs /memory || fail mounting a tmpfs
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /system ||
	fail mounting an overlay
mount --move /proc /system/proc
mkdir -p /system/mnt
mount -t 9p -o "$options" share /system/mnt || fail mounting the shared directory
exec switch_root /system /bin/sh /mnt/guest.sh

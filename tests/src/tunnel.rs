//! Devices whose other end is a program: packets as they are, without Ethernet headers.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::Namespace;

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF` of `linux/if_tun.h`.
    set_device,
    0x4004_54ca,
    libc::ifreq
);

/// The program's end of a tunnel.
#[derive(Debug)]
pub struct Tunnel(File);

impl Tunnel {
    /// Makes a device in a namespace, without addresses.
    ///
    /// # Errors
    ///
    /// That there is one of this name.
    pub fn new(namespace: &Namespace, device: &str) -> Result<Self> {
        let tunnel = namespace.within(|| {
            let tunnel = File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .context("opening /dev/net/tun")?;
            // SAFETY: an all-zero ifreq is a valid value of that plain C struct.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
            // SAFETY: the request is of the type that the command reads.
            unsafe { set_device(tunnel.as_raw_fd(), &raw const request) }
                .context("making a tunnel")?;
            Ok(tunnel)
        })?;
        namespace.ip(&format!("link set {device} up"))?;
        Ok(Self(tunnel))
    }

    /// Hands a packet to the namespace.
    ///
    /// # Errors
    ///
    /// That the device is down.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        (&self.0).write_all(packet).context("writing to a tunnel")
    }

    /// The next packet that `wanted` accepts, or `None` when none came within `limit`.
    ///
    /// # Errors
    ///
    /// That the device went away.
    pub fn receive(
        &self,
        limit: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut waiting = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            if poll(&mut waiting, left)? == 0 {
                return Ok(None);
            }
            let mut packet = vec![0; 70_000];
            let length = (&self.0)
                .read(&mut packet)
                .context("reading from a tunnel")?;
            packet.truncate(length);
            if wanted(&packet) {
                return Ok(Some(packet));
            }
        }
    }
}

/// Two tunnels of which each gets what the other sends, until dropped.
#[derive(Debug)]
pub struct Joined {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Joined {
    /// Joins them.
    #[must_use]
    pub fn new(one: Tunnel, other: Tunnel) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Arc::new([one, other]);
        let threads = [0, 1]
            .map(|from| {
                let (stop, ends) = (Arc::clone(&stop), Arc::clone(&ends));
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let packet = ends[from].receive(Duration::from_millis(20), |_| true);
                        if let Ok(Some(packet)) = packet {
                            // One that is down gets nothing.
                            let _ = ends[1 - from].send(&packet);
                        }
                    }
                })
            })
            .into();
        Self { stop, threads }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

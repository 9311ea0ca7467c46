//! Other people's programs on the same devices: they see what they saw before, and what
//! they drop is dropped.

use std::{
    ffi::{CString, c_char, c_long},
    io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Client, Namespace, Node};
use nix::{libc, net::if_::if_nametoindex};

use crate::{
    CLUSTER_IPS, FAMILIES, NODE, NODE_PORT, OUTSIDE, PATIENCE, POD_PORT, SERVICE_PORT, SILENCE,
    Server, Setting, addresses, listen, meets_as,
    proxy::{ExternalTrafficPolicy::Local, Mode, Service},
};

const SETTING: Setting = Setting {
    mode: Mode::Nftables,
    masquerade: true,
    strict: true,
};

/// A classifier that counts packets, and says the same of each.
struct Program {
    program: OwnedFd,
    counter: OwnedFd,
}

/// Which of a device's packets a program sees (`enum bpf_attach_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Ingress = 46,
    Egress = 47,
}

/// Whether it sees them before all others, or after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    First = 1 << 3,
    Last = 1 << 4,
}

/// `struct bpf_attr` of the commands that attach and detach.
#[repr(C)]
struct Attach {
    device: u32,
    program: u32,
    hook: u32,
    flags: u32,
    rest: [u64; 4],
}

impl Program {
    const DROP: u32 = 2;
    /// Let the next program decide.
    const NEXT: u32 = u32::MAX;

    fn new(verdict: u32) -> Result<Self> {
        #[repr(C)]
        struct Create {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            entries: u32,
        }
        #[repr(C)]
        struct Load {
            program_type: u32,
            count: u32,
            instructions: *const u64,
            license: *const c_char,
        }
        const ARRAY: u32 = 2;
        const SCHED_CLS: u32 = 3;
        let map = Create {
            map_type: ARRAY,
            key_size: 4,
            value_size: 8,
            entries: 1,
        };
        let counter = descriptor(bpf(0, &map).context("creating a map")?)?;
        let map = u64::try_from(counter.as_raw_fd())?;
        let instructions: [u64; 6] = [
            // r1 = &map[0], of two words (`BPF_PSEUDO_MAP_VALUE`).
            map << 32 | 0x2118,
            0,
            // r2 = 1; lock *(u64 *)r1 += r2
            1 << 32 | 0x2b7,
            0x21db,
            // r0 = verdict; exit
            u64::from(verdict) << 32 | 0xb7,
            0x95,
        ];
        let load = Load {
            program_type: SCHED_CLS,
            count: u32::try_from(instructions.len())?,
            instructions: instructions.as_ptr(),
            license: c"GPL".as_ptr(),
        };
        let program = descriptor(bpf(5, &load).context("loading a program")?)?;
        Ok(Self { program, counter })
    }

    /// How many packets it has seen.
    fn seen(&self) -> Result<u64> {
        #[repr(C)]
        struct Lookup {
            map: u64,
            key: *const u32,
            value: *mut u64,
            flags: u64,
        }
        let (key, mut value) = (0, 0);
        let lookup = Lookup {
            map: u64::try_from(self.counter.as_raw_fd())?,
            key: &raw const key,
            value: &raw mut value,
            flags: 0,
        };
        bpf(1, &lookup).context("reading a map")?;
        Ok(value)
    }

    /// Runs it for a device's packets until the value is dropped.
    fn attach<'a>(
        &'a self,
        node: &'a Node,
        device: &str,
        hook: Hook,
        place: Place,
    ) -> Result<Attached<'a>> {
        let device = node.within(|| Ok(if_nametoindex(device)?))?;
        let attached = Attached {
            program: self,
            node,
            device,
            hook,
        };
        attached
            .call(8, place as u32)
            .with_context(|| format!("attaching a program to device {device}"))?;
        Ok(attached)
    }

    /// Pins it, for `tc` to find.
    fn pin(&self, node: &Node, path: &str) -> Result<()> {
        #[repr(C)]
        struct Pin {
            path: *const c_char,
            program: u32,
            flags: u32,
        }
        let path = CString::new(path)?;
        node.within(|| {
            let pin = Pin {
                path: path.as_ptr(),
                program: u32::try_from(self.program.as_raw_fd())?,
                flags: 0,
            };
            bpf(6, &pin).context("pinning a program")?;
            Ok(())
        })
    }
}

struct Attached<'a> {
    program: &'a Program,
    node: &'a Node,
    device: u32,
    hook: Hook,
}

impl Attached<'_> {
    fn call(&self, command: c_long, flags: u32) -> Result<()> {
        let program = u32::try_from(self.program.program.as_raw_fd())?;
        let attributes = Attach {
            device: self.device,
            program,
            hook: self.hook as u32,
            flags,
            rest: [0; 4],
        };
        // Devices are found in the caller's network namespace.
        self.node.within(|| bpf(command, &attributes).map(drop))
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let _ = self.call(9, 0);
    }
}

fn descriptor(number: c_long) -> Result<OwnedFd> {
    // SAFETY: the kernel has just made the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(number)?) })
}

/// The system call, with the beginning of `union bpf_attr` that the command knows.
fn bpf<T>(command: c_long, attributes: &T) -> Result<c_long> {
    // SAFETY: the attributes are as long as is said and point to live values.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    ensure!(done >= 0, "{}", io::Error::last_os_error());
    Ok(done)
}

/// Adds a program as a filter of `tc`.
fn add_filter(
    node: &Node,
    program: &Program,
    device: &str,
    hook: &str,
    priority: u16,
) -> Result<()> {
    let pin = format!("/sys/fs/bpf/{device}-{hook}-{priority}");
    program.pin(node, &pin)?;
    node.run(&format!(
        "tc filter add dev {device} {hook} prio {priority} bpf da object-pinned {pin}"
    ))?;
    node.run(&format!("rm {pin}"))?;
    Ok(())
}

/// That pods, outside and services meet as they should: through each of the devices.
struct Scene<'a> {
    node: &'a Node,
    outside: &'a Namespace,
    server: &'a Server,
    client: &'a Server,
}

impl Scene<'_> {
    fn all_meet(&self) -> Result<()> {
        for family in FAMILIES {
            let own = addresses(self.client)?[family];
            let service = SocketAddr::new(CLUSTER_IPS[family], SERVICE_PORT);
            meets_as(self.client, service, "server", own)?;
            let direct = SocketAddr::new(addresses(self.server)?[family], POD_PORT);
            meets_as(self.client, direct, "server", own)?;
            let by_node = SocketAddr::new(NODE[family], NODE_PORT);
            meets_as(self.outside, by_node, "server", OUTSIDE[family])?;
            let outside = SocketAddr::new(OUTSIDE[family], POD_PORT);
            meets_as(self.client, outside, "outside", NODE[family])?;
        }
        Ok(())
    }

    /// Which of them do not meet anybody.
    fn silent(&self) -> Result<[bool; 3]> {
        let silent = |from: &Namespace, to: SocketAddr| {
            from.meet(Client::UnconnectedUdp, to, SILENCE).is_err()
        };
        Ok([
            silent(self.client, (OUTSIDE[0], POD_PORT).into()),
            silent(self.client, (CLUSTER_IPS[0], SERVICE_PORT).into()),
            silent(self.client, (addresses(self.server)?[0], POD_PORT).into()),
        ])
    }

    fn gateway_port(&self) -> Result<String> {
        let link = self.node.json("ip -j link show dev cni0")?;
        let peer = link[0]["link"].as_str();
        Ok(peer.context("cni0 has no peer here")?.to_owned())
    }
}

/// Filters of `tc`, before ours and after.
#[test]
fn filters_go_on_seeing_what_they_saw() -> Result<()> {
    let node = SETTING.node()?;
    let outside = node.outside()?;
    // Some are there before us.
    node.run("tc qdisc add dev uplink0 clsact")?;
    let mut programs = Vec::new();
    let mut count = |device: &str, hook: &'static str, priority| -> Result<()> {
        let program = Program::new(Program::NEXT)?;
        add_filter(&node, &program, device, hook, priority)?;
        programs.push((device.to_owned(), hook, priority, program));
        Ok(())
    };
    for hook in ["ingress", "egress"] {
        count("uplink0", hook, 7)?;
    }
    let network = SETTING.network(&node);
    let server = Server::new(&network, "server")?;
    let client = Server::new(&network, "client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    SETTING.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    let scene = Scene {
        node: &node,
        outside: &outside,
        server: &server,
        client: &client,
    };
    let veth = client.host_veth()?;
    let gateway = scene.gateway_port()?;
    for hook in ["ingress", "egress"] {
        count("uplink0", hook, 60_000)?;
    }
    // Before ours, which lead the packet elsewhere, so that there is no place behind them.
    for device in [veth, &gateway] {
        count(device, "ingress", 1)?;
    }
    scene.all_meet()?;
    let rounds = 10;
    let seen = || {
        let seen = programs.iter().map(|(.., program)| program.seen());
        seen.collect::<Result<Vec<_>>>()
    };
    let before = seen()?;
    for _ in 0..rounds {
        for family in FAMILIES {
            for to in [
                (OUTSIDE[family], POD_PORT),
                (CLUSTER_IPS[family], SERVICE_PORT),
            ] {
                client.meet(Client::UnconnectedUdp, to.into(), PATIENCE)?;
            }
        }
    }
    let after = seen()?;
    for (at, (device, hook, priority, _)) in programs.iter().enumerate() {
        // In each family one datagram to outside and its answer, and the same by the
        // service, which pass the gateway twice.
        let expected = match device.as_str() {
            "uplink0" => 2 * rounds,
            device if device == veth => 4 * rounds,
            _ => 6 * rounds,
        };
        let seen = after[at] - before[at];
        ensure!(
            (expected..expected + 20).contains(&seen),
            "{device} {hook} {priority} has seen {seen} packets, not {expected}"
        );
    }
    // A filter that drops does so, also where ours has undone the masquerade before.
    let dropper = Program::new(Program::DROP)?;
    let drops = |device: &str, hook: &str, priority: u16| -> Result<[bool; 3]> {
        add_filter(&node, &dropper, device, hook, priority)?;
        let silent = scene.silent();
        node.run(&format!(
            "tc filter del dev {device} {hook} prio {priority}"
        ))?;
        scene
            .all_meet()
            .with_context(|| format!("{device} {hook} {priority} is gone"))?;
        silent
    };
    for hook in ["ingress", "egress"] {
        for priority in [3, 59_000] {
            let silent = drops("uplink0", hook, priority)?;
            ensure!(
                silent == [true, false, false],
                "{hook} {priority}: {silent:?}"
            );
        }
    }
    let silent = drops(veth, "ingress", 2)?;
    ensure!(silent == [true; 3], "{silent:?}");
    let silent = drops(&gateway, "ingress", 2)?;
    ensure!(silent == [true, true, false], "{silent:?}");
    Ok(())
}

/// Programs of `tcx`, before ours and after, there before us and coming later.
#[test]
fn programs_go_on_seeing_what_they_saw() -> Result<()> {
    let node = SETTING.node()?;
    let outside = node.outside()?;
    let next = Program::new(Program::NEXT)?;
    let places = [
        (Hook::Ingress, Place::First),
        (Hook::Ingress, Place::Last),
        (Hook::Egress, Place::First),
        (Hook::Egress, Place::Last),
    ];
    // A device takes each program once.
    let earlier = places.map(|_| Program::new(Program::NEXT));
    let earlier = earlier.into_iter().collect::<Result<Vec<_>>>()?;
    let attached = places
        .iter()
        .zip(&earlier)
        .map(|(&(hook, place), program)| program.attach(&node, "uplink0", hook, place))
        .collect::<Result<Vec<_>>>()?;
    let network = SETTING.network(&node);
    let server = Server::new(&network, "server")?;
    let client = Server::new(&network, "client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    SETTING.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    let scene = Scene {
        node: &node,
        outside: &outside,
        server: &server,
        client: &client,
    };
    scene.all_meet()?;
    drop(attached);
    let veth = client.host_veth()?.to_owned();
    let gateway = scene.gateway_port()?;
    let dropper = Program::new(Program::DROP)?;
    let uplink = [true, false, false];
    for (device, hook, place, silent) in [
        ("uplink0", Hook::Ingress, Place::First, uplink),
        ("uplink0", Hook::Ingress, Place::Last, uplink),
        ("uplink0", Hook::Egress, Place::First, uplink),
        ("uplink0", Hook::Egress, Place::Last, uplink),
        // On ports, tcx comes before our filters.
        (&veth, Hook::Ingress, Place::First, [true; 3]),
        (&gateway, Hook::Ingress, Place::First, [true, true, false]),
    ] {
        let what = format!("{device}, {hook:?}, {place:?}");
        let other = next.attach(&node, device, hook, place)?;
        let before = next.seen()?;
        scene
            .all_meet()
            .with_context(|| format!("{what}: with another program"))?;
        ensure!(next.seen()? > before + 10, "{what}: it has seen nothing");
        drop(other);
        let other = dropper.attach(&node, device, hook, place)?;
        let seen = scene.silent()?;
        ensure!(seen == silent, "{what}: {seen:?}, not {silent:?}");
        drop(other);
        scene
            .all_meet()
            .with_context(|| format!("{what}: without it"))?;
    }
    Ok(())
}

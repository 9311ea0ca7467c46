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
use serde_json::Value;

use crate::{
    CLUSTER_IPS, NODE, NODE_PORT, OUTSIDE, PATIENCE, POD_PORT, SERVICE_PORT, SILENCE, Server,
    Setting, addresses, listen, meets_as,
    proxy::{ExternalTrafficPolicy::Local, Mode, Service},
};

const SETTING: Setting = Setting {
    mode: Mode::Nftables,
    masquerade: true,
    strict: true,
};

/// A classifier that says the same of every packet.
struct Program(OwnedFd);

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
        struct Load {
            program_type: u32,
            count: u32,
            instructions: *const u64,
            license: *const c_char,
        }
        const SCHED_CLS: u32 = 3;
        // r0 = verdict; exit
        let instructions: [u64; 2] = [u64::from(verdict) << 32 | 0xb7, 0x95];
        let load = Load {
            program_type: SCHED_CLS,
            count: 2,
            instructions: instructions.as_ptr(),
            license: c"GPL".as_ptr(),
        };
        let program = bpf(5, &load).context("loading a program")?;
        // SAFETY: the kernel has just made the descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(i32::try_from(program)?) }))
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
                program: u32::try_from(self.0.as_raw_fd())?,
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
        let program = u32::try_from(self.program.0.as_raw_fd())?;
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

/// Adds a filter that counts and lets the next one decide.
fn count(node: &Node, device: &str, hook: &str, priority: u16) -> Result<()> {
    node.run(&format!(
        "tc filter add dev {device} {hook} prio {priority} protocol all matchall \
         action continue"
    ))
    .map(drop)
}

/// What that filter has seen.
fn counted(node: &Node, device: &str, hook: &str, priority: u16) -> Result<u64> {
    let filters = node.json(&format!("tc -s -j filter show dev {device} {hook} prio {priority}"))?;
    filters
        .as_array()
        .into_iter()
        .flatten()
        .find_map(|filter| filter["options"]["actions"][0]["stats"]["packets"].as_u64())
        .with_context(|| format!("no counter in {}", Value::from(filters.clone())))
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
        for family in 0..2 {
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
    for hook in ["ingress", "egress"] {
        count(&node, "uplink0", hook, 7)?;
    }
    let network = SETTING.network(&node);
    let server = Server::new(&network, "server")?;
    let client = Server::new(&network, "client")?;
    let web = Service::new("web", CLUSTER_IPS, SERVICE_PORT, server.endpoints()?);
    SETTING.serve(&node, &[web.node_port(NODE_PORT, Local)])?;
    let _outside = listen(&outside, &OUTSIDE, POD_PORT, "outside")?;
    let scene = Scene { node: &node, outside: &outside, server: &server, client: &client };
    let veth = client.host_veth()?;
    let gateway = scene.gateway_port()?;
    for hook in ["ingress", "egress"] {
        count(&node, "uplink0", hook, 60_000)?;
    }
    // The first filter of ours is behind these; the last thing that it does is to lead
    // the packet elsewhere, so there is no place behind it.
    for device in [veth, gateway.as_str()] {
        count(&node, device, "ingress", 1)?;
    }
    scene.all_meet()?;
    let sights = [
        ("uplink0", "ingress", 7),
        ("uplink0", "ingress", 60_000),
        ("uplink0", "egress", 7),
        ("uplink0", "egress", 60_000),
        (veth, "ingress", 1),
        (gateway.as_str(), "ingress", 1),
    ];
    let all = || -> Result<Vec<u64>> {
        let counted = |&(device, hook, priority)| counted(&node, device, hook, priority);
        sights.iter().map(counted).collect()
    };
    let before = all()?;
    let rounds = 10;
    for _ in 0..rounds {
        for family in 0..2 {
            let any = SocketAddr::new(crate::unspecified_like((OUTSIDE[family], 0).into()), 0);
            for to in [(OUTSIDE[family], POD_PORT), (CLUSTER_IPS[family], SERVICE_PORT)] {
                client.meet_from(Client::UnconnectedUdp, any, to.into(), PATIENCE)?;
            }
        }
    }
    let after = all()?;
    for ((sight, before), after) in sights.iter().zip(&before).zip(&after) {
        // One datagram each way and family, and on the pod's and the host's side twice.
        let expected = if sight.0 == "uplink0" { 2 * rounds } else { 4 * rounds };
        let seen = after - before;
        ensure!(
            (expected..expected + 20).contains(&seen),
            "{sight:?} has seen {seen} packets, not {expected}"
        );
    }
    // A filter that drops does so, also where ours has undone the masquerade before.
    let dropper = Program::new(Program::DROP)?;
    dropper.pin(&node, "/sys/fs/bpf/dropper")?;
    let drops = |device: &str, hook: &str, priority: u16| -> Result<[bool; 3]> {
        node.run(&format!(
            "tc filter add dev {device} {hook} prio {priority} bpf da \
             object-pinned /sys/fs/bpf/dropper"
        ))?;
        let silent = scene.silent();
        node.run(&format!("tc filter del dev {device} {hook} prio {priority}"))?;
        scene.all_meet().with_context(|| format!("{device} {hook} {priority} is gone"))?;
        silent
    };
    for hook in ["ingress", "egress"] {
        for priority in [3, 59_000] {
            let silent = drops("uplink0", hook, priority)?;
            ensure!(silent == [true, false, false], "{hook} {priority}: {silent:?}");
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
    let scene = Scene { node: &node, outside: &outside, server: &server, client: &client };
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
        scene.all_meet().with_context(|| format!("{what}: with another program"))?;
        drop(other);
        let other = dropper.attach(&node, device, hook, place)?;
        let seen = scene.silent()?;
        ensure!(seen == silent, "{what}: {seen:?}, not {silent:?}");
        drop(other);
        scene.all_meet().with_context(|| format!("{what}: without it"))?;
    }
    Ok(())
}

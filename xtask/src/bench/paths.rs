//! Where traffic goes: the node of a contender with all that it passes, and what it has to
//! pass at least.

use std::{
    cell::Cell,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{Namespace, Outside, Sandbox, wait_for};
use serde_json::json;

use super::{
    measurement::Contender,
    node::{Arena, PORT_MAPPINGS, Recipe},
    peer::Ends,
};

/// What listens, wherever it is.
const PORT: u16 = 80;
/// What is published for it, where it is.
const HOST_PORT: u16 = 8080;

/// Addresses that are the machine outside's, too (RFC 2544, RFC 3849).
const OTHERS: [&str; 2] = ["198.18.0.0/15", "2001:db8:198::/64"];
/// Within the first of them, where datagrams go to, each to another.
pub(super) const CALLED: [Ipv4Addr; 2] = [
    Ipv4Addr::new(198, 19, 0, 0),
    Ipv4Addr::new(198, 19, 255, 255),
];

/// How long a new node may take until its addresses are no longer tentative.
const READY: Duration = Duration::from_secs(10);
/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_millis(250);
/// What `ip` calls an XDP program that the driver runs.
const NATIVE: u64 = 1;

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    PodToPod,
    PodToHost,
    OutsideToPort,
    LocalhostToPort,
    PodToOutside,
}

impl Path {
    pub(super) const ALL: [Self; 5] = [
        Self::PodToPod,
        Self::PodToHost,
        Self::OutsideToPort,
        Self::LocalhostToPort,
        Self::PodToOutside,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PodToPod => "pod to pod",
            Self::PodToHost => "pod to host",
            Self::OutsideToPort => "outside to published port",
            Self::LocalhostToPort => "localhost to published port",
            Self::PodToOutside => "pod to outside",
        }
    }

    /// Whether a contender does anything here that others do not.
    pub(super) fn concerns(self, contender: Contender) -> bool {
        match contender {
            Contender::BpfBridge | Contender::Stock | Contender::Floor => true,
            Contender::Xdp => self == Self::OutsideToPort,
            Contender::NoNetfilter => self == Self::PodToOutside,
        }
    }
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn pick(self, addresses: Addresses) -> IpAddr {
        match self {
            Self::V4 => addresses.0.into(),
            Self::V6 => addresses.1.into(),
        }
    }

    /// Every address of a machine.
    pub(super) fn any(self) -> IpAddr {
        self.pick((Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED))
    }

    /// Where connections from pods go to. A pod has some 28,000 ports to connect from; with
    /// eight addresses it takes longer until two connections look the same than netfilter
    /// remembers one that is closed (10 s).
    pub(super) fn servers(self) -> [IpAddr; 8] {
        std::array::from_fn(|number| match self {
            Self::V4 => Ipv4Addr::new(198, 18, 0, number as u8).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, number as u16).into(),
        })
    }
}

/// One of each family.
type Addresses = (Ipv4Addr, Ipv6Addr);

/// The node of a contender with its pods, and the machine outside.
pub(super) struct Site {
    pub(super) contender: Contender,
    arena: Arena,
    outside: Outside,
    /// Two pods with nothing published, and one with a port.
    client: Sandbox,
    server: Sandbox,
    publisher: Sandbox,
    /// Where those that listen have theirs, by path.
    addresses: [Addresses; Path::ALL.len()],
    /// Where nobody can go, whatever it costs.
    blocked: Vec<(Path, Family)>,
    kube_proxy: Cell<bool>,
}

impl Site {
    /// Makes everything, and waits until all paths can be gone.
    pub(super) fn new(contender: Contender, recipe: &Recipe) -> Result<Self> {
        Self::make(contender, recipe)
            .with_context(|| format!("making the node of {}", contender.name()))
    }

    fn make(contender: Contender, recipe: &Recipe) -> Result<Self> {
        let arena = Arena::new(contender, recipe)?;
        // Before the first ADD, as it is on a node.
        let outside = arena.node.outside()?;
        for others in OTHERS {
            outside.ip(&format!("route add local {others} dev lo"))?;
        }
        let [client, server, publisher] =
            ["client", "server", "publisher"].map(|name| arena.node.sandbox(name));
        let mut site = Self {
            contender,
            arena,
            outside,
            client: client?,
            server: server?,
            publisher: publisher?,
            addresses: [(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED); Path::ALL.len()],
            blocked: Vec::new(),
            kube_proxy: Cell::new(false),
        };
        if contender == Contender::Floor {
            site.connect()?;
        } else {
            site.attach()?;
        }
        for path in Path::ALL {
            for family in Family::ALL {
                if may_fail(contender, path, family) {
                    // No address is tentative any more: one attempt tells.
                    if site.wait(path, family, Duration::ZERO).is_err() {
                        site.blocked.push((path, family));
                    }
                } else {
                    site.wait(path, family, READY)?;
                }
            }
        }
        Ok(site)
    }

    /// Attaches the pods.
    fn attach(&mut self) -> Result<()> {
        let mappings: Vec<_> = ["tcp", "udp"]
            .map(|protocol| {
                json!({"hostPort": HOST_PORT, "containerPort": PORT, "protocol": protocol})
            })
            .into();
        let arena = &self.arena;
        let publishing = self
            .publisher
            .attachment()
            .capability(PORT_MAPPINGS, mappings.into());
        let publisher = arena.node.within(|| arena.add_here(&publishing))?;
        let server = arena.add(&self.server)?;
        arena.add(&self.client)?;
        let both = |added: &super::node::Added, key: &str| -> Result<Addresses> {
            match (added.v4(key)?, added.v6(key)?) {
                (IpAddr::V4(v4), IpAddr::V6(v6)) => Ok((v4, v6)),
                _ => bail!("the {key} of one family is of the other"),
            }
        };
        let publisher = both(&publisher, "address")?;
        self.addresses = Path::ALL.map(|_| publisher);
        self.addresses[Path::PodToPod as usize] = both(&server, "address")?;
        self.addresses[Path::PodToHost as usize] = both(&server, "gateway")?;
        self.addresses[Path::PodToOutside as usize] = (Outside::V4, Outside::V6);
        if self.contender == Contender::Xdp {
            let uplink = self.arena.node.device(Outside::UPLINK)?;
            ensure!(
                uplink["xdp"]["mode"] == NATIVE,
                "no native XDP on {}: {}",
                Outside::UPLINK,
                uplink["xdp"]
            );
        }
        Ok(())
    }

    /// Connects the ends of each path by a veth pair of its own.
    fn connect(&mut self) -> Result<()> {
        for path in Path::ALL {
            let number = path as u8;
            let (from, to) = self.namespaces(path);
            let (near, far) = (format!("from{number}"), format!("to{number}"));
            from.connect(&near, to, &far)?;
            let subnet = u16::from(number);
            let v4 = |host| Ipv4Addr::new(10, 78, number, host);
            let v6 = |host| Ipv6Addr::new(0xfd78, subnet, 0, 0, 0, 0, 0, host);
            for (namespace, device, host) in [(from, &near, 1), (to, &far, 2)] {
                namespace.ip(&format!(
                    "addr add {}/24 dev {device}\naddr add {}/64 dev {device} nodad",
                    v4(host),
                    v6(host.into()),
                ))?;
            }
            if path == Path::PodToOutside {
                for other in OTHERS {
                    let gateway: IpAddr = if other.contains(':') {
                        v6(2).into()
                    } else {
                        v4(2).into()
                    };
                    from.ip(&format!("route add {other} via {gateway}"))?;
                }
            }
            self.addresses[path as usize] = (v4(2), v6(2));
        }
        Ok(())
    }

    fn namespaces(&self, path: Path) -> (&Namespace, &Namespace) {
        let node: &Namespace = &self.arena.node;
        match path {
            Path::PodToPod => (&self.client, &self.server),
            Path::PodToHost => (&self.client, node),
            Path::OutsideToPort => (&self.outside, &self.publisher),
            Path::LocalhostToPort => (node, &self.publisher),
            Path::PodToOutside => (&self.client, &self.outside),
        }
    }

    /// The ends of a path, on one CPU.
    pub(super) fn ends(&self, path: Path, family: Family, cpu: usize) -> Ends<'_> {
        let (from, to) = self.namespaces(path);
        let published = match path {
            Path::OutsideToPort => Some((Outside::NODE_V4, Outside::NODE_V6)),
            Path::LocalhostToPort => Some((Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)),
            _ => None,
        };
        let published = published.filter(|_| self.contender != Contender::Floor);
        Ends {
            from,
            to,
            listen: (family.pick(self.addresses[path as usize]), PORT).into(),
            through: published.map(|addresses| (family.pick(addresses), HOST_PORT).into()),
            cpu,
        }
    }

    /// Whether this contender lets anyone through there.
    pub(super) fn reaches(&self, path: Path, family: Family) -> bool {
        !self.blocked.contains(&(path, family))
    }

    /// Waits until a connection can be made, at least for one attempt.
    fn wait(&self, path: Path, family: Family, limit: Duration) -> Result<()> {
        let ends = self.ends(path, family, 0);
        let target = ends.target();
        let what = format!("connection to {target}, {}", path.name());
        wait_for(&what, limit, || {
            // An address that is tentative cannot be listened on.
            let _listener = ends.to.within(|| Ok(TcpListener::bind(ends.listen)?))?;
            ends.from.within(|| {
                TcpStream::connect_timeout(&target, ATTEMPT)?;
                Ok(true)
            })
        })
    }

    /// Puts kube-proxy's rules beside those of the contender, for good.
    pub(super) fn add_kube_proxy(&self) -> Result<()> {
        if !self.kube_proxy.replace(true) {
            let node = &self.arena.node;
            node.within(|| Ok(fs::write("/run/rules", KUBE_PROXY)?))?;
            node.run("iptables-restore --noflush /run/rules")?;
        }
        Ok(())
    }

    /// For an error.
    pub(super) fn whose(&self) -> String {
        format!("on the node of {}", self.contender.name())
    }
}

/// Stock's portmap lets 127.0.0.1 through only: what `::1` sends cannot leave the node.
fn may_fail(contender: Contender, path: Path, family: Family) -> bool {
    (contender, path, family) == (Contender::Stock, Path::LocalhostToPort, Family::V6)
}

/// The rules of kube-proxy's iptables mode that packets between pods and machines
/// outside meet.
const KUBE_PROXY: &str = "\
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]
:KUBE-SEP-R75T7LXI5PWKQQKZ - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-NPX46M4PTMTKRN6Y
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-NPX46M4PTMTKRN6Y ! -s 10.77.0.0/16 -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-NPX46M4PTMTKRN6Y -j KUBE-SEP-R75T7LXI5PWKQQKZ
-A KUBE-SEP-R75T7LXI5PWKQQKZ -p tcp -m tcp -j DNAT --to-destination 198.51.100.1:6443
COMMIT
";

//! Masquerade: what it costs a pod to talk to a machine outside, as the node.
//!
//! The machine outside has no route to the pods: what it answers was masqueraded.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Outside, Sandbox};

use super::{
    Plan, Settings,
    measurement::{Better, Contender, Measurement},
    node::{Arena, Chain, Netfilter, Recipe},
    peer::{Connector, Ends, Flow, Transport},
    traffic::{CONNECT, TCP_RR, UDP_RR, WARM_UP},
};

/// What one must know to read the results.
pub(super) const NOTE: &str = "Masquerade: a pod connects to a machine outside; new connections \
     go to eight addresses of it in turn. The rows of `netfilter` `none` have the same samples \
     of the others. kube-proxy's rules are those that every node has, and of a service.";

/// How many addresses the machine outside has more. A pod has some 28,000 ports to
/// connect from; this many times as many connections differ, which takes longer than
/// netfilter remembers one that is closed (10 s).
const ADDRESSES: u8 = 8;

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

/// Something that is told of a kind of traffic.
struct Row {
    what: &'static str,
    unit: &'static str,
    better: Better,
}

impl Row {
    const fn time(what: &'static str) -> Self {
        Self {
            what,
            unit: "µs",
            better: Better::Lower,
        }
    }
}

const CONNECTIONS: Row = Row {
    what: "TCP_CRR",
    unit: "1000/s",
    better: Better::Higher,
};

const TESTS: [(Transport, &[Row]); 3] = [
    (Transport::Connections, &[CONNECTIONS, Row::time("connect")]),
    (TCP_RR, &[Row::time("TCP_RR")]),
    (UDP_RR, &[Row::time("UDP_RR")]),
];

/// On nodes with no rules but those of the contender, and beside kube-proxy's.
const SURROUNDINGS: [&str; 2] = ["", ", beside kube-proxy"];

/// How long this part will take, in ms.
pub(super) fn estimate(settings: &Settings) -> u64 {
    let tests = SURROUNDINGS.len() * TESTS.len();
    // One of the contenders is there twice.
    let lanes = settings.contenders.len() as u64 + 1;
    (tests * settings.masquerade_rounds) as u64 * lanes * turn(settings)
}

fn turn(settings: &Settings) -> u64 {
    let slice = settings.slice + settings.slice / WARM_UP + CONNECT;
    u64::try_from(slice.as_millis()).unwrap_or(u64::MAX)
}

/// The node of a contender, the machine outside, and the pod that asks it.
struct Lane {
    arena: Arena,
    netfilter: Netfilter,
    outside: Outside,
    pod: Sandbox,
}

/// Measures all kinds of traffic, beside no rules first.
pub(super) fn measure(
    settings: &Settings,
    recipe: &Recipe,
    plan: &Plan,
) -> Result<Vec<Measurement>> {
    plan.say("making nodes".to_owned());
    let mut lanes = Vec::new();
    for &contender in &settings.contenders {
        let runs_ours = match contender {
            Contender::BpfBridge => true,
            Contender::Stock => recipe.against.is_some(),
            Contender::Floor => false,
        };
        lanes.push(Lane::new(contender, recipe, Netfilter::Routed)?);
        if runs_ours {
            lanes.push(Lane::new(contender, recipe, Netfilter::None)?);
        }
    }
    let mut measurements = Vec::new();
    for surroundings in SURROUNDINGS {
        if !surroundings.is_empty() {
            for lane in &lanes {
                lane.write_rules()?;
            }
        }
        for (transport, rows) in TESTS {
            let what = format!("{}{surroundings}", rows[0].what);
            plan.say(format!("pod to outside, {what}"));
            let samples = samples(settings, &lanes, transport, plan).context(what)?;
            for (number, row) in rows.iter().enumerate() {
                for (netfilter, remark) in [
                    (Netfilter::Routed, ""),
                    (Netfilter::None, ", netfilter none"),
                ] {
                    measurements.push(Measurement {
                        name: format!("pod to outside, {}{remark}{surroundings}", row.what),
                        unit: row.unit,
                        better: row.better,
                        additive: false,
                        values: values(settings, &lanes, netfilter, &samples, number),
                    });
                }
            }
        }
    }
    Ok(measurements)
}

/// The values of each contender's lane that has this `netfilter`; of its only one, if
/// the choice means nothing to it.
fn values(
    settings: &Settings,
    lanes: &[Lane],
    netfilter: Netfilter,
    samples: &[Vec<Vec<f64>>],
    row: usize,
) -> Vec<(Contender, Vec<f64>)> {
    settings
        .contenders
        .iter()
        .filter_map(|&contender| {
            let of = |lane: &Lane| lane.arena.contender == contender;
            let at = lanes
                .iter()
                .position(|lane| of(lane) && lane.netfilter == netfilter)
                .or_else(|| lanes.iter().position(of))?;
            let values = samples[at].iter().map(|sample| sample[row]).collect();
            Some((contender, values))
        })
        .collect()
}

/// What each lane achieved in each round: a value for each row.
fn samples(
    settings: &Settings,
    lanes: &[Lane],
    transport: Transport,
    plan: &Plan,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let mut samples = vec![Vec::new(); lanes.len()];
    for round in 0..settings.masquerade_rounds {
        for at in 0..lanes.len() {
            // Everyone goes first as often as the others.
            let at = (round + at) % lanes.len();
            let sample = lanes[at].run(settings, transport);
            samples[at].push(sample.with_context(|| lanes[at].whose())?);
            plan.advance(turn(settings));
        }
    }
    Ok(samples)
}

impl Lane {
    fn new(contender: Contender, recipe: &Recipe, netfilter: Netfilter) -> Result<Self> {
        let arena = Arena::new(contender, recipe, Chain::Masquerading(netfilter))?;
        // Before the first ADD, as it is on a node.
        let outside = arena.node.outside()?;
        for address in addresses() {
            outside.ip(&format!("addr add {address}/24 dev eth0"))?;
        }
        let pod = arena.node.sandbox("pod")?;
        let lane = Self {
            arena,
            netfilter,
            outside,
            pod,
        };
        if contender == Contender::Floor {
            lane.outside
                .run("ip link add pod type veth peer name eth0 netns pod")?;
            lane.outside
                .ip("addr add 10.77.0.1/16 dev pod\nlink set pod up")?;
            lane.pod.ip("addr add 10.77.0.3/16 dev eth0\n\
                         link set eth0 up\n\
                         route add default via 10.77.0.1")?;
        } else {
            lane.arena.add(&lane.pod).with_context(|| lane.whose())?;
        }
        Ok(lane)
    }

    /// Puts kube-proxy's rules beside those of the contender.
    fn write_rules(&self) -> Result<()> {
        let node = &self.arena.node;
        node.within(|| Ok(fs::write("/run/rules", KUBE_PROXY)?))?;
        node.run("iptables-restore --noflush /run/rules")?;
        Ok(())
    }

    /// Takes a turn; returns a value for each row of the test.
    fn run(&self, settings: &Settings, transport: Transport) -> Result<Vec<f64>> {
        let connects = transport == Transport::Connections;
        let address: IpAddr = if connects {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Outside::V4.into()
        };
        let ends = Ends {
            from: &self.pod,
            to: &self.outside,
            listen: (address, 0).into(),
            through: None,
            cpu: settings.cpu,
        };
        let (warm_up, slice) = (settings.slice / WARM_UP, settings.slice);
        if connects {
            let addresses: Vec<_> = addresses().map(IpAddr::from).collect();
            let connector = Connector::start(&ends)?.spread(&addresses);
            connector.run(warm_up)?;
            let found = connector.run(slice)?;
            return Ok(vec![found.rate / 1e3, found.connect]);
        }
        let mut flow = Flow::start(&ends, transport)?;
        flow.run(warm_up)?;
        Ok(vec![1e6 / flow.run(slice)?])
    }

    /// For an error.
    fn whose(&self) -> String {
        let netfilter = match self.netfilter {
            Netfilter::Routed => "",
            Netfilter::None => " without netfilter",
        };
        format!("the node of {}{netfilter}", self.arena.contender.name())
    }
}

/// The addresses that new connections go to.
fn addresses() -> impl Iterator<Item = Ipv4Addr> {
    let [a, b, c, _] = Outside::V4.octets();
    (0..ADDRESSES).map(move |number| Ipv4Addr::new(a, b, c, 100 + number))
}

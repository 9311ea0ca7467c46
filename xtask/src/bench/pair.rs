//! Two pods of a contender's, and nothing else on its node.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Namespace, Sandbox};

use super::{
    Settings,
    measurement::Contender,
    node::{Arena, Recipe},
    peer::{Ends, Flow, Transport},
};

/// Two pods, and the host, of one contender.
pub(super) struct Pair {
    pub(super) arena: Arena,
    pub(super) first: Sandbox,
    pub(super) second: Sandbox,
    pub(super) first_v4: IpAddr,
    pub(super) second_v4: IpAddr,
    pub(super) host_v4: IpAddr,
}

impl Pair {
    pub(super) fn new(contender: Contender, recipe: &Recipe) -> Result<Self> {
        let arena = Arena::new(contender, recipe)?;
        let first = arena.node.sandbox("first")?;
        let second = arena.node.sandbox("second")?;
        let (first_v4, second_v4, host_v4);
        if contender == Contender::Floor {
            // Each end of the pair is a pod; there is no host between.
            arena
                .node
                .run("ip link add eth0 netns first type veth peer name eth0 netns second")?;
            first.ip("addr add 10.77.0.2/16 dev eth0\nlink set eth0 up")?;
            second.ip("addr add 10.77.0.3/16 dev eth0\nlink set eth0 up")?;
            first_v4 = IpAddr::from([10, 77, 0, 2]);
            second_v4 = IpAddr::from([10, 77, 0, 3]);
            host_v4 = second_v4;
        } else {
            first_v4 = arena.add(&first)?.v4("address")?;
            let added = arena.add(&second)?;
            second_v4 = added.v4("address")?;
            host_v4 = added.v4("gateway")?;
        }
        Ok(Self {
            arena,
            first,
            second,
            first_v4,
            second_v4,
            host_v4,
        })
    }

    pub(super) fn flow(&self, transport: Transport, to_host: bool, cpu: usize) -> Result<Flow> {
        let (to, address): (&Namespace, IpAddr) =
            if to_host && self.arena.contender != Contender::Floor {
                (&self.arena.node, self.host_v4)
            } else {
                (&self.second, self.second_v4)
            };
        let ends = Ends {
            from: &self.first,
            to,
            listen: (address, 0).into(),
            through: None,
            cpu,
        };
        Flow::start(&ends, transport)
            .with_context(|| format!("on the node of {}", self.arena.contender.name()))
    }
}

/// The nodes of all contenders that have two pods.
pub(super) fn pairs(settings: &Settings, recipe: &Recipe) -> Result<Vec<Pair>> {
    settings
        .contenders
        .iter()
        .map(|&contender| Pair::new(contender, recipe))
        .collect()
}

//! ADD: from a configuration to a pod that can talk.
//!
//! 1. The veth pair is born, its far end in the sandbox and under its final name.
//! 2. The addresses are reserved, and given to the container's interface, which
//!    is still down.
//! 3. Under the lock of the bridge: the gateway is found or made, the port joins
//!    its segment, and the program is attached.
//! 4. The interface goes up, the routes are added: the pod can talk.
//!
//! If anything fails, [`del`] removes what was made, as it would for a pod that
//! lived.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bpf_bridge_common::layout::{
    PORT_DIRECT, PORT_HAIRPIN, PORT_ISOLATED, PORT_MACSPOOFCHK, PORT_MASQUERADED, PORT_PROMISC,
    PORT_PUBLISHED, PORT_VIA_HOST,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{ALREADY_ATTACHED, collect, del, is_alive, open_sandbox};
use crate::{
    attachment::{Attachment, Claim, Record, hash},
    boot,
    cni::{
        Call, CniError, CniResult, ErrorCode, NetworkConfig,
        config::Netfilter,
        result::{Interface, IpConfig, Route},
    },
    datapath::{self, Datapath, PortSpec, nat},
    gateway::{self, Gateway},
    ipam::Ipam,
    link::{
        self, LinkError, LinkSettings, Netlink, VethIndices, VethSpec,
        sysctl::{Family, Sysctl, SysctlError},
    },
    lock,
    mac::MacAddr,
    masquerade,
    netns::Netns,
    ports, uplinks,
};

/// How long the kernel may take to make the host veth's carrier and the local
/// routes, which it does by work queues; mostly it takes microseconds.
const READY: Duration = Duration::from_secs(2);
/// The least MTU, in bytes, with which the kernel lets a device have IPv6.
const IPV6_MTU: u32 = 1280;
/// How many addresses an interface gets at most, of which the kernel sets no limit: each
/// costs time, and entries in tables that all pods share.
const ADDRESSES_MAX: usize = 256;
/// `RT_SCOPE_LINK` of `linux/rtnetlink.h`: what has this scope has no next hop.
const SCOPE_LINK: u8 = 253;
/// How long duplicate address detection may take (`enabledad`), as with the stock
/// plugin.
const SETTLE: Duration = Duration::from_secs(5);

/// Attaches the container: wholly, or not at all. What is returned with the
/// result is to be recorded as complete when the runtime has the result.
pub(super) fn run(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    netns: &Path,
) -> Result<(CniResult, Claim, Record), CniError> {
    let sandbox = open_sandbox(call, netns)?;
    let host = Netlink::host()?;
    let mut claim = attachment.claim()?;
    if let Some(record) = claim.record() {
        if record.complete && is_alive(&host, attachment)? {
            return Err(already_attached(attachment));
        }
        // The pod died without a DEL, or its ADD did.
        del::unplug(attachment, Some(record))?;
        // Another IPAM plugin would refuse to give it addresses twice.
        Ipam::of(call).del(call, attachment)?;
    }
    let mac = call.config.mac.unwrap_or_else(|| attachment.mac());
    let pair = match create_pair(&host, call.config, attachment, &sandbox, mac) {
        Ok(pair) => pair,
        Err(error) => {
            // Nothing was made, so what is there is somebody else's.
            claim.remove()?;
            return Err(error);
        }
    };
    let mut add = Add {
        call,
        config: call.config,
        attachment,
        host: &host,
        sandbox: &sandbox,
        pair,
        mac,
    };
    let mut shared = Shared::default();
    match add.run(&mut claim, &mut shared) {
        Ok((result, record)) => Ok((result, claim, record)),
        Err(error) => {
            lock::allow_for_undoing();
            let mut left = del::remove(call, attachment, Some(claim));
            left.extend(shared.undo(&host, &call.config.bridge).err());
            Err(match collect(left) {
                Ok(()) => error,
                Err(left) => error.with_details(format!("and cleaning up: {left}")),
            })
        }
    }
}

fn already_attached(attachment: &Attachment<'_>) -> CniError {
    CniError::new(
        ErrorCode::Other(ALREADY_ATTACHED),
        format!(
            "container {} has interface {} in network {} already: DEL must come before another ADD",
            attachment.container_id, attachment.ifname, attachment.network
        ),
    )
}

fn create_pair(
    host: &Netlink,
    config: &NetworkConfig,
    attachment: &Attachment<'_>,
    sandbox: &Netns,
    mac: MacAddr,
) -> Result<VethIndices, CniError> {
    let name = attachment.host_veth();
    let spec = VethSpec {
        name: &name,
        // Never a source of frames, but systemd would choose another one later.
        mac: Some(gateway::mac(&config.bridge)),
        peer_name: attachment.ifname,
        peer_mac: Some(mac),
        peer_netns: Some(sandbox),
        mtu: config.mtu.unwrap_or(0),
    };
    match host.create_veth(&spec) {
        // One whose ADD was killed before it wrote a record.
        Err(LinkError::Exists {
            in_sandbox: false, ..
        }) => {
            del::unplug(attachment, None)?;
            Ok(host.create_veth(&spec)?)
        }
        Err(error @ LinkError::Exists { .. }) => Err(error.into()),
        // It may be there although the answer did not come.
        Err(error) => {
            let _ = del::unplug(attachment, None);
            Err(error.into())
        }
        Ok(made) => Ok(made),
    }
}

/// What an ADD makes that later ones will use too, if it comes to its end.
#[derive(Default)]
struct Shared {
    /// The programs for the network's log level were loaded, and the maps if they
    /// were the first.
    loaded: bool,
    /// The gateway was made.
    gateway: Option<Gateway>,
    /// Its addresses.
    addresses: Vec<IpAddr>,
}

impl Shared {
    /// Removes it again, unless somebody else has begun to use it.
    fn undo(self, host: &Netlink, bridge: &str) -> Result<(), CniError> {
        if self.gateway.is_none() && !self.loaded {
            return Ok(());
        }
        let _lock = gateway::lock(bridge)?;
        let Some(mut datapath) = Datapath::open()? else {
            return Ok(());
        };
        if let Some(gateway) = &self.gateway {
            gateway::remove_unused(host, &mut datapath, bridge, gateway, &self.addresses)?;
        }
        if self.loaded {
            datapath.unload_if_unused()?;
        }
        Ok(())
    }
}

/// An ADD whose veth pair was born.
struct Add<'a> {
    call: &'a Call<'a>,
    config: &'a NetworkConfig,
    attachment: &'a Attachment<'a>,
    host: &'a Netlink,
    sandbox: &'a Netns,
    pair: VethIndices,
    mac: MacAddr,
}

impl Add<'_> {
    /// Everything after the birth of the veth pair.
    fn run(
        &mut self,
        claim: &mut Claim,
        shared: &mut Shared,
    ) -> Result<(CniResult, Record), CniError> {
        claim.write(&self.record(&[]))?;
        // The alias is what proves to others that the attachment lives, so it
        // comes before there is an address to lose.
        self.host.configure(
            self.pair.host,
            &LinkSettings {
                alias: Some(&self.attachment.alias()),
                no_link_local: true,
                ipv4: gateway::PORT_SETTINGS,
                ..LinkSettings::default()
            },
        )?;

        let given = self.addresses()?;
        let inside = Netlink::open(self.sandbox)?;
        self.mac = self.choose_mac(&inside, &given)?;
        self.assign(&inside, &given)?;

        let mut record = self.record(&given.ips);
        let (gateway, node) = self.join(claim, shared, &mut record, &given)?;
        // It is in nobody's way while it looks.
        ports::warn_of_listeners(&record.published, &node);
        if shared.gateway.is_some() {
            // As often as gateways are made, those that were deleted are forgotten.
            gateway::forget_deleted(self.host)?;
        }

        if !self.config.disable_container_interface {
            inside.set_up(self.pair.peer)?;
            self.host.wait_running(self.pair.host, READY)?;
            for route in &given.routes {
                inside.add_route(self.pair.peer, &as_link_route(route))?;
            }
            if self.config.enable_dad {
                settle(&inside, self.pair.peer)?;
                confirm(&record)?;
            }
            // Those of IPv4 are there when the kernel has acknowledged them.
            for &address in record.addresses.iter().filter(|address| address.is_ipv6()) {
                inside.wait_local(address, READY)?;
            }
        }
        Ok((self.result(&gateway, given), record))
    }

    /// What is known of the attachment before it joins a segment.
    fn record(&self, ips: &[IpConfig]) -> Record {
        Record {
            complete: false,
            era: boot::era().to_owned(),
            bridge: self.config.bridge.clone(),
            segment: 0,
            host_ifindex: self.pair.host,
            mac: self.mac.octets(),
            addresses: ips.iter().map(|ip| ip.address.addr()).collect(),
            log_level: self.config.log_level,
            published: ports::wanted(self.config, ips),
            masquerade: masquerade::wanted(self.config, ips),
        }
    }

    /// Unless one was asked for, the MAC address follows from the first IP address:
    /// who still knows the pod that had the one before, knows the other of this
    /// pod too.
    fn choose_mac(&self, inside: &Netlink, given: &CniResult) -> Result<MacAddr, CniError> {
        let (None, Some(ip)) = (self.config.mac, given.ips.first()) else {
            return Ok(self.mac);
        };
        let address = ip.address.addr().to_string();
        let mac = MacAddr::from_hash(hash(["pod", &self.config.bridge, &address]));
        inside.configure(
            self.pair.peer,
            &LinkSettings {
                mac: Some(mac),
                ..LinkSettings::default()
            },
        )?;
        Ok(mac)
    }

    /// Whether neighbours may know one of the addresses with another MAC address,
    /// and must be told: one was asked for, or the addresses do not come in the
    /// fixed pairs in which the embedded store gives them. It is not done for
    /// every pod because each announcement is flooded to all others, which was
    /// most of what an ADD cost on a node of 1,000 pods.
    fn must_announce(&self, given: &CniResult) -> bool {
        let store = matches!(Ipam::of(self.call), Ipam::HostLocal(_));
        let in_order = store && self.config.requested_ips.is_empty();
        self.config.mac.is_some() || given.ips.len() > 1 && !in_order
    }

    /// Reserves addresses, and completes what IPAM left open.
    fn addresses(&self) -> Result<CniResult, CniError> {
        let ipam = Ipam::of(self.call);
        let mut given = ipam.add(self.call, self.attachment, &|other| {
            // What this one has is of an ADD before; whoever cannot be asked
            // counts as alive.
            other != self.attachment && is_alive(self.host, other).unwrap_or(true)
        })?;
        if given.ips.is_empty()
            && let Some(name) = &self.config.ipam_type
        {
            return Err(CniError::internal(format!(
                "the IPAM plugin {name:?} gave no address"
            )));
        }
        believable(&given.ips)?;
        if let Some(mtu) = self.config.mtu
            && mtu < IPV6_MTU
            && has_ipv6(&given)
        {
            return Err(CniError::invalid_config(
                "mtu",
                mtu,
                format!("{IPV6_MTU} or more for a network with IPv6 addresses (RFC 8200, 5)"),
            ));
        }
        complete_gateways(self.config, &mut given);
        Ok(given)
    }

    /// Gives the container's interface its settings and addresses while it is
    /// down: when it goes up, it announces them.
    fn assign(&self, inside: &Netlink, given: &CniResult) -> Result<(), CniError> {
        let ipv6 = has_ipv6(given);
        let dad = self.config.enable_dad;
        let announce = self.must_announce(given);
        self.sandbox
            .run_in(|| settings(self.attachment.ifname, dad, ipv6, announce))??;
        if ports::uses_xdp(self.config) {
            self.sandbox
                .run_in(|| link::enable_gro(self.attachment.ifname))?
                .map_err(|error| {
                    CniError::internal(format!(
                        "switching GRO on for {}, which XDP needs: {error}",
                        self.attachment.ifname
                    ))
                })?;
        }
        if ipv6 && !dad {
            // The kernel's own stays tentative until a work queue has run.
            inside.add_address(self.pair.peer, link_local(self.mac), false)?;
        }
        for ip in &given.ips {
            inside.add_address(self.pair.peer, ip.address, dad)?;
        }
        Ok(())
    }

    /// The port joins the segment, whose gateway is made if it is the first. Returns that,
    /// and the node's addresses if anything is published.
    fn join(
        &self,
        claim: &mut Claim,
        shared: &mut Shared,
        record: &mut Record,
        given: &CniResult,
    ) -> Result<(Gateway, Vec<IpAddr>), CniError> {
        let config = self.config;
        let level = config.log_level;
        let mtu = config.mtu.unwrap_or(0);
        let _lock = gateway::lock(&config.bridge)?;
        let outside = record.outside();
        let parts = nat::parts(
            config.is_gateway,
            outside.masquerades,
            outside.publishes,
            config.netfilter == Netfilter::None,
        );
        let (mut datapath, loaded) = Datapath::open_or_load(level, &parts)?;
        shared.loaded = loaded;
        let (gateway, created) =
            gateway::ensure(self.host, &mut datapath, level, &config.bridge, mtu)?;
        if created {
            shared.gateway = Some(gateway.clone());
            shared.addresses = given.ips.iter().filter_map(|ip| ip.gateway).collect();
        }
        record.segment = gateway.segment;
        claim.write(record)?;
        datapath.attach(level, self.host, record.host_ifindex)?;
        self.add_port(
            &mut datapath,
            &PortSpec {
                ifindex: record.host_ifindex,
                segment: gateway.segment,
                flags: flags(config, record),
                mac: record.mac,
                addresses: &record.addresses,
                tentative: config.enable_dad && !config.disable_container_interface,
            },
        )?;
        if datapath.has_claims(gateway.segment)? {
            // Of the address, perhaps, before it was assigned.
            let ifname = self.attachment.ifname;
            self.sandbox.run_in(|| announce(ifname))??;
        }
        self.serve(&mut datapath, &gateway, given)?;
        let mut nat = match outside.is_needed() {
            true => datapath.nat()?,
            false => None,
        };
        let node = match &mut nat {
            Some(nat) => uplinks::serve(self.host, nat, config, outside)?,
            None => Vec::new(),
        };
        masquerade::begin(self.host, nat.as_mut(), config, record, &given.ips)?;
        self.host.set_up(record.host_ifindex)?;
        if let Some(nat) = &mut nat {
            ports::publish(self.host, nat, config, record, &gateway, &given.ips)?;
        }
        Ok((gateway, node))
    }

    /// Adds the port, in place of dead ones that had its addresses: pods whose
    /// sandbox went without a DEL.
    fn add_port(&self, datapath: &mut Datapath, port: &PortSpec<'_>) -> Result<(), CniError> {
        loop {
            match datapath.add_port(port) {
                Err(datapath::Error::Assigned { port: owner, .. })
                    if self.host.link_by_index(owner)?.is_none() =>
                {
                    datapath.remove_dead_port(owner)?;
                }
                added => return Ok(added?),
            }
        }
    }

    /// Makes the gateway what it must be for this network.
    fn serve(
        &self,
        datapath: &mut Datapath,
        gateway: &Gateway,
        given: &CniResult,
    ) -> Result<(), CniError> {
        let config = self.config;
        if config.promisc_mode {
            self.host.configure(
                gateway.segment,
                &LinkSettings {
                    promisc: Some(true),
                    ..LinkSettings::default()
                },
            )?;
        }
        if !config.is_gateway {
            return Ok(());
        }
        let addresses: Vec<IpNet> = given.ips.iter().filter_map(gateway_address).collect();
        gateway::ensure_addresses(
            self.host,
            datapath,
            gateway,
            &config.bridge,
            &addresses,
            config.force_address,
        )?;
        Ok(gateway::enable_forwarding(&addresses)?)
    }

    /// What the runtime is told: the interfaces in the order of the stock plugin
    /// (gateway device, host veth, container's), after those of plugins before.
    fn result(&self, gateway: &Gateway, given: CniResult) -> CniResult {
        let mtu = Some(self.pair.mtu);
        let mac_of_gateway = Some(gateway.mac.to_string());
        let bridge = Interface {
            name: self.config.bridge.clone(),
            mac: mac_of_gateway.clone(),
            mtu: Some(gateway.mtu),
            ..Interface::default()
        };
        let host_veth = Interface {
            name: self.attachment.host_veth(),
            mac: mac_of_gateway,
            mtu,
            ..Interface::default()
        };
        let container = Interface {
            name: self.attachment.ifname.to_owned(),
            mac: Some(self.mac.to_string()),
            mtu,
            sandbox: Some(self.sandbox.path().display().to_string()),
            ..Interface::default()
        };
        let ips = given.ips.into_iter().map(|ip| IpConfig {
            interface: Some(2),
            ..ip
        });
        CniResult {
            interfaces: vec![bridge, host_veth, container],
            ips: ips.collect(),
            routes: given.routes,
            dns: if self.config.dns.is_empty() {
                given.dns
            } else {
                self.config.dns.clone()
            },
            extra: given.extra,
        }
        .after(self.config.prev_result.clone().unwrap_or_default())
    }
}

/// Refuses addresses of an IPAM plugin that mean something else to the node, or to the
/// programs, than they say.
fn believable(ips: &[IpConfig]) -> Result<(), CniError> {
    if ips.len() > ADDRESSES_MAX {
        return Err(CniError::internal(format!(
            "the IPAM plugin gave {} addresses: one interface gets {ADDRESSES_MAX} at most",
            ips.len()
        )));
    }
    for ip in ips {
        let address = ip.address.addr();
        let both = [Some(address), ip.gateway];
        if let Some(mapped) = both
            .into_iter()
            .flatten()
            .find(|ip| ip.to_canonical() != *ip)
        {
            return Err(CniError::internal(format!(
                "the IPAM plugin gave {mapped}, which is an IPv4 address in IPv6's notation: it \
                 must be {}",
                mapped.to_canonical()
            )));
        }
        if let Some(gateway) = ip.gateway
            && gateway.is_ipv4() != address.is_ipv4()
        {
            return Err(CniError::internal(format!(
                "the IPAM plugin gave {address} the gateway {gateway}: it must be of the same \
                 family"
            )));
        }
    }
    Ok(())
}

fn has_ipv6(given: &CniResult) -> bool {
    given.ips.iter().any(|ip| ip.address.addr().is_ipv6())
}

fn flags(config: &NetworkConfig, record: &Record) -> u32 {
    [
        (config.hairpin_mode, PORT_HAIRPIN),
        (config.mac_spoof_check, PORT_MACSPOOFCHK),
        (config.port_isolation, PORT_ISOLATED),
        (config.promisc_mode, PORT_PROMISC),
        (!config.port_mappings.is_empty(), PORT_PUBLISHED),
        (record.outside().masquerades, PORT_MASQUERADED),
        (config.netfilter == Netfilter::All, PORT_VIA_HOST),
        (config.netfilter == Netfilter::None, PORT_DIRECT),
    ]
    .into_iter()
    .filter_map(|(set, flag)| set.then_some(flag))
    .sum()
}

/// The gateway's address in the subnet of a container's.
fn gateway_address(ip: &IpConfig) -> Option<IpNet> {
    IpNet::new(ip.gateway?, ip.address.prefix_len()).ok()
}

/// The address after that of the subnet, as `calcGatewayIP` of the stock plugin
/// has it: an IPv6 subnet's own address is its routers' anycast address (RFC 4291
/// 2.6.1), and so it is of the two in a /31.
fn first_host(address: IpNet) -> Option<IpAddr> {
    match address.network() {
        IpAddr::V4(subnet) => subnet
            .to_bits()
            .checked_add(1)
            .map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(subnet) => subnet
            .to_bits()
            .checked_add(1)
            .map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

/// `isGateway` without a gateway from IPAM makes it the first host of the subnet;
/// `isDefaultGateway` adds the default routes that IPAM did not; and a route
/// without a next hop goes through the gateway of its family, but for one that is
/// on the link by its scope.
fn complete_gateways(config: &NetworkConfig, given: &mut CniResult) {
    if config.is_gateway {
        for ip in &mut given.ips {
            ip.gateway = ip.gateway.or_else(|| first_host(ip.address));
        }
    }
    let gateway = |dst: IpNet| {
        given
            .ips
            .iter()
            .filter(|ip| ip.address.addr().is_ipv4() == dst.addr().is_ipv4())
            .find_map(|ip| ip.gateway)
    };
    for route in &mut given.routes {
        if route.scope.is_none_or(|scope| scope < SCOPE_LINK) {
            route.gw = route.gw.or_else(|| gateway(route.dst));
        }
    }
    if !config.is_default_gateway {
        return;
    }
    for default in [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())] {
        let present = given.routes.iter().any(|route| route.dst == default);
        if !present && let Some(gateway) = gateway(default) {
            given.routes.push(Route::new(default, Some(gateway)));
        }
    }
}

/// A route as it is added.
pub(super) fn as_link_route(route: &Route) -> link::Route {
    link::Route {
        priority: route.priority.unwrap_or(0),
        table: route.table,
        scope: route.scope,
        mtu: route.mtu.unwrap_or(0),
        advmss: route.advmss.unwrap_or(0),
        ..link::Route::new(route.dst, route.gw)
    }
}

/// The link-local address that the kernel would give the interface, with its
/// prefix.
fn link_local(mac: MacAddr) -> IpNet {
    // 64 fits, so there is no error to tell of.
    Ipv6Net::new(mac.link_local(), 64)
        .unwrap_or_default()
        .into()
}

/// The sandbox's settings, in the order in which they must be made.
fn settings(ifname: &str, dad: bool, ipv6: bool, announces: bool) -> Result<(), SysctlError> {
    let on_interface = |family, key, value| set(family, ifname, key, value);
    if ipv6 {
        let _ = Sysctl::device(Family::Ipv6, "lo", "disable_ipv6")?.set(0)?;
        on_interface(Family::Ipv6, "disable_ipv6", 0)?;
        on_interface(Family::Ipv6, "keep_addr_on_down", 1)?;
    }
    if dad {
        on_interface(Family::Ipv6, "enhanced_dad", 1)?;
    }
    on_interface(Family::Ipv6, "accept_dad", u32::from(dad))?;
    if announces {
        announce(ifname)?;
    }
    // Its routes come from this plugin, and every question for routers would be
    // flooded. What a router announces by itself is still heard.
    on_interface(Family::Ipv6, "router_solicitations", 0)
}

/// Lets the interface tell all others of its addresses when it goes up.
fn announce(ifname: &str) -> Result<(), SysctlError> {
    set(Family::Ipv4, ifname, "arp_notify", 1)?;
    set(Family::Ipv6, ifname, "ndisc_notify", 1)
}

/// A kernel without the setting does without what it is for.
fn set(family: Family, ifname: &str, key: &str, value: u32) -> Result<(), SysctlError> {
    Sysctl::device(family, ifname, key)?.set(value).map(drop)
}

/// The addresses are the pod's alone: nobody may say otherwise any more.
fn confirm(record: &Record) -> Result<(), CniError> {
    let _lock = gateway::lock(&record.bridge)?;
    if let Some(mut datapath) = Datapath::open()? {
        datapath.confirm(record.segment, &record.addresses)?;
    }
    Ok(())
}

/// Waits until duplicate address detection has ended.
fn settle(inside: &Netlink, ifindex: u32) -> Result<(), CniError> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let addresses = inside.addresses(ifindex)?;
        if let Some(duplicate) = addresses.iter().find(|address| address.duplicate) {
            return Err(CniError::internal(format!(
                "duplicate address detection found another owner of {}",
                duplicate.net
            )));
        }
        if addresses.iter().all(|address| !address.tentative) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(CniError::internal(format!(
                "duplicate address detection did not end within {} s",
                SETTLE.as_secs()
            )));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

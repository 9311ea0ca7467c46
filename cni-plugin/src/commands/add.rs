//! ADD: from a configuration to a pod that can talk.
//!
//! 1. The veth pair is born, its far end in the sandbox and under its final name.
//! 2. The addresses are reserved, and given to the container's interface, which
//!    is still down.
//! 3. Under the lock of the bridge: the gateway is found or made, the port joins
//!    its segment, and the program is attached.
//! 4. The interface goes up, the routes are added: the pod can talk.
//!
//! If anything fails, [`del`] removes what was made, as it would
//! for a pod that lived.

use std::{
    net::IpAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    attachment::{Attachment, Claim, Record},
    cni::{
        Call, CniError, CniResult, ErrorCode, NetworkConfig,
        result::{Interface, IpConfig, Route},
    },
    datapath::{Datapath, PortSpec},
    gateway::{self, Gateway},
    ipam::Ipam,
    link::{
        self, LinkError, LinkSettings, Netlink, VethIndices, VethSpec,
        sysctl::{Family, Sysctl, SysctlError},
    },
    mac::MacAddr,
    netns::Netns,
};
use bpf_bridge_common::layout::{PORT_HAIRPIN, PORT_ISOLATED, PORT_MACSPOOFCHK, PORT_PROMISC};

use super::{ALREADY_ATTACHED, del, is_alive, open_sandbox};

/// How long the host veth may take to get its carrier; it takes microseconds.
const CARRIER: Duration = Duration::from_secs(2);
/// The least MTU, in bytes, with which the kernel lets a device have IPv6.
const IPV6_MTU: u32 = 1280;
/// How long duplicate address detection may take (`enabledad`), as with the stock
/// plugin.
const SETTLE: Duration = Duration::from_secs(5);

/// Attaches the container: wholly, or not at all.
pub(super) fn run(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    netns: &Path,
) -> Result<CniResult, CniError> {
    let sandbox = open_sandbox(call, netns)?;
    let host = Netlink::host()?;
    let mut claim = attachment.claim()?;
    if let Some(record) = claim.record() {
        if record.complete && is_alive(&host, attachment)? {
            return Err(already_attached(attachment));
        }
        // The pod died without a DEL, or its ADD did.
        del::unplug(attachment, Some(record))?;
    }
    let mac = call.config.mac.unwrap_or_else(MacAddr::random);
    let pair = match create_pair(&host, call.config, attachment, &sandbox, mac) {
        Ok(pair) => pair,
        Err(error) => {
            // Nothing was made yet, so what is there is somebody else's.
            claim.remove()?;
            return Err(error);
        }
    };
    let attached = attach(call, attachment, &mut claim, &host, &sandbox, pair, mac);
    attached.map_err(|error| undo(call, attachment, claim, error))
}

/// Removes what a failed ADD made.
fn undo(call: &Call<'_>, attachment: &Attachment<'_>, claim: Claim, error: CniError) -> CniError {
    let left: Vec<String> = del::remove(call, attachment, Some(claim))
        .iter()
        .map(CniError::to_string)
        .collect();
    if left.is_empty() {
        error
    } else {
        error.with_details(format!("and cleaning up: {}", left.join("; ")))
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
        made => Ok(made?),
    }
}

/// Everything after the birth of the veth pair.
fn attach(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    claim: &mut Claim,
    host: &Netlink,
    sandbox: &Netns,
    pair: VethIndices,
    mac: MacAddr,
) -> Result<CniResult, CniError> {
    let config = call.config;
    let mut record = Record {
        complete: false,
        bridge: config.bridge.clone(),
        segment: 0,
        host_ifindex: pair.host,
        mac: mac.octets(),
        addresses: Vec::new(),
        log_level: config.log_level,
    };
    claim.write(record.clone())?;
    // The alias is what proves to others that the attachment lives, so it comes
    // before there is an address to lose.
    host.configure(
        pair.host,
        &LinkSettings {
            alias: Some(&attachment.alias()),
            no_link_local: true,
            ..LinkSettings::default()
        },
    )?;

    let mut given = Ipam::of(call).add(call, attachment, &|other| {
        // What this one has is of an ADD before; whoever cannot be asked counts
        // as alive.
        other != attachment && is_alive(host, other).unwrap_or(true)
    })?;
    if given.ips.is_empty() && config.ipam_type.is_some() {
        return Err(CniError::internal(format!(
            "the IPAM plugin {:?} gave no address",
            config.ipam_type.as_deref().unwrap_or_default()
        )));
    }
    if let Some(mtu) = config.mtu
        && mtu < IPV6_MTU
        && given.ips.iter().any(|ip| ip.address.addr().is_ipv6())
    {
        return Err(CniError::invalid_config(
            "mtu",
            mtu,
            format!("{IPV6_MTU} or more for a network with IPv6 addresses (RFC 8200, 5)"),
        ));
    }
    complete_gateways(config, &mut given);
    let inside = Netlink::open(sandbox)?;
    assign(config, attachment, sandbox, &inside, pair.peer, mac, &given)?;

    record.addresses = given.ips.iter().map(|ip| ip.address.addr()).collect();
    let gateway = join(config, claim, host, &mut record, pair.host, &given)?;

    if !config.disable_container_interface {
        inside.set_up(pair.peer)?;
        host.wait_running(pair.host, CARRIER)?;
        for route in &given.routes {
            inside.add_route(pair.peer, &with_gateway(route, &given.ips))?;
        }
        if config.enable_dad {
            settle(&inside, pair.peer)?;
        }
    }
    record.complete = true;
    claim.write(record)?;
    let mtu = inside.link_by_index(pair.peer)?.map(|link| link.mtu);
    Ok(result(
        config, attachment, sandbox, &gateway, given, mac, mtu,
    ))
}

/// The port joins the segment. If the gateway is made for it, and it cannot join,
/// the gateway goes again.
fn join(
    config: &NetworkConfig,
    claim: &mut Claim,
    host: &Netlink,
    record: &mut Record,
    ifindex: u32,
    given: &CniResult,
) -> Result<Gateway, CniError> {
    let level = config.log_level;
    let _lock = gateway::lock(&config.bridge)?;
    let (mut datapath, loaded) = Datapath::open_or_load(level)?;
    let mut segment = None;
    let joined = (|| {
        let gateway = gateway::ensure(
            host,
            &mut datapath,
            level,
            &config.bridge,
            config.mtu.unwrap_or(0),
        )?;
        segment = Some(gateway.clone());
        record.segment = gateway.segment;
        claim.write(record.clone())?;
        let name = host_name(host, ifindex)?;
        datapath.attach(level, &name)?;
        datapath.add_port(&PortSpec {
            ifindex,
            segment: gateway.segment,
            flags: flags(config),
            mac: record.mac,
            addresses: &record.addresses,
        })?;
        serve(config, host, &mut datapath, &gateway, given)?;
        host.set_up(ifindex)?;
        Ok(gateway)
    })();
    joined.map_err(|error: CniError| {
        let undone = (|| {
            if let Some(gateway) = segment.filter(|gateway| gateway.created) {
                datapath.remove_port(ifindex, gateway.segment, record.mac, &record.addresses)?;
                let addresses: Vec<IpAddr> = given.ips.iter().filter_map(|ip| ip.gateway).collect();
                gateway::remove_unused(host, &mut datapath, &gateway, &addresses)?;
            }
            if loaded {
                datapath.unload_if_unused()?;
            }
            Ok::<(), CniError>(())
        })();
        match undone {
            Ok(()) => error,
            Err(left) => error.with_details(format!("and cleaning up: {left}")),
        }
    })
}

fn host_name(host: &Netlink, ifindex: u32) -> Result<String, CniError> {
    match host.link_by_index(ifindex)? {
        Some(link) => Ok(link.name),
        None => Err(CniError::internal(format!(
            "the host veth with ifindex {ifindex} vanished: its sandbox was removed during the ADD"
        ))),
    }
}

fn flags(config: &NetworkConfig) -> u32 {
    [
        (config.hairpin_mode, PORT_HAIRPIN),
        (config.mac_spoof_check, PORT_MACSPOOFCHK),
        (config.port_isolation, PORT_ISOLATED),
        (config.promisc_mode, PORT_PROMISC),
    ]
    .into_iter()
    .filter_map(|(set, flag)| set.then_some(flag))
    .sum()
}

/// What the gateway must be for this network.
fn serve(
    config: &NetworkConfig,
    host: &Netlink,
    datapath: &mut Datapath,
    gateway: &Gateway,
    given: &CniResult,
) -> Result<(), CniError> {
    if config.promisc_mode {
        host.configure(
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
    for &address in &addresses {
        gateway::ensure_address(
            host,
            datapath,
            gateway,
            &config.bridge,
            address,
            config.force_address,
        )?;
    }
    Ok(gateway::enable_forwarding(&addresses)?)
}

/// The gateway's address in the subnet of a container's.
fn gateway_address(ip: &IpConfig) -> Option<IpNet> {
    IpNet::new(ip.gateway?, ip.address.prefix_len()).ok()
}

/// `isGateway` without a gateway from IPAM makes it the first host of the subnet;
/// `isDefaultGateway` adds the default routes that IPAM did not.
fn complete_gateways(config: &NetworkConfig, given: &mut CniResult) {
    if config.is_gateway {
        for ip in &mut given.ips {
            ip.gateway = ip.gateway.or_else(|| ip.address.hosts().next());
        }
    }
    if !config.is_default_gateway {
        return;
    }
    for default in [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())] {
        let same_family = |address: IpAddr| address.is_ipv4() == default.addr().is_ipv4();
        let gateway = given
            .ips
            .iter()
            .find(|ip| same_family(ip.address.addr()))
            .and_then(|ip| ip.gateway);
        let present = given
            .routes
            .iter()
            .any(|route| route.dst == default && route.gw.is_some());
        if let Some(gateway) = gateway
            && !present
        {
            given.routes.push(Route::new(default, Some(gateway)));
        }
    }
}

/// A route as it is added: without a next hop of its own it goes through the
/// gateway of its family.
pub(super) fn with_gateway(route: &Route, ips: &[IpConfig]) -> link::Route {
    let gateway = || {
        ips.iter()
            .filter_map(|ip| ip.gateway)
            .find(|gateway| gateway.is_ipv4() == route.dst.addr().is_ipv4())
    };
    link::Route {
        priority: route.priority.unwrap_or(0),
        table: route.table,
        scope: route.scope,
        mtu: route.mtu.unwrap_or(0),
        advmss: route.advmss.unwrap_or(0),
        ..link::Route::new(route.dst, route.gw.or_else(gateway))
    }
}

/// Gives the container's interface its settings and addresses while it is down:
/// when it goes up, it announces them.
fn assign(
    config: &NetworkConfig,
    attachment: &Attachment<'_>,
    sandbox: &Netns,
    inside: &Netlink,
    ifindex: u32,
    mac: MacAddr,
    given: &CniResult,
) -> Result<(), CniError> {
    let ipv6 = given.ips.iter().any(|ip| ip.address.addr().is_ipv6());
    sandbox.run_in(|| settings(config, attachment.ifname, ipv6))??;
    if ipv6 && !config.enable_dad {
        // The kernel's own stays tentative until a work queue has run.
        inside.add_address(ifindex, link_local(mac), false)?;
    }
    for ip in &given.ips {
        inside.add_address(ifindex, ip.address, config.enable_dad)?;
    }
    Ok(())
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
fn settings(config: &NetworkConfig, ifname: &str, ipv6: bool) -> Result<(), SysctlError> {
    let on_interface = |family, key, value| {
        // A kernel without the setting does without what it is for.
        Sysctl::device(family, ifname, key)?.set(value).map(drop)
    };
    if ipv6 {
        let _ = Sysctl::device(Family::Ipv6, "lo", "disable_ipv6")?.set(0)?;
        on_interface(Family::Ipv6, "disable_ipv6", 0)?;
        on_interface(Family::Ipv6, "keep_addr_on_down", 1)?;
    }
    if config.enable_dad {
        on_interface(Family::Ipv6, "enhanced_dad", 1)?;
    }
    on_interface(Family::Ipv6, "accept_dad", u32::from(config.enable_dad))?;
    // Those who knew the addresses from a former pod hear of the new one.
    on_interface(Family::Ipv4, "arp_notify", 1)?;
    on_interface(Family::Ipv6, "ndisc_notify", 1)
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

/// What the runtime is told: the interfaces in the order of the stock plugin
/// (gateway device, host veth, container's), after those of plugins before.
fn result(
    config: &NetworkConfig,
    attachment: &Attachment<'_>,
    sandbox: &Netns,
    gateway: &Gateway,
    given: CniResult,
    mac: MacAddr,
    mtu: Option<u32>,
) -> CniResult {
    let mac_of_gateway = Some(gateway.mac.to_string());
    let bridge = Interface {
        name: config.bridge.clone(),
        mac: mac_of_gateway.clone(),
        mtu: Some(gateway.mtu),
        ..Interface::default()
    };
    let host_veth = Interface {
        name: attachment.host_veth(),
        mac: mac_of_gateway,
        mtu,
        ..Interface::default()
    };
    let container = Interface {
        name: attachment.ifname.to_owned(),
        mac: Some(mac.to_string()),
        mtu,
        sandbox: Some(sandbox.path().display().to_string()),
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
        dns: if config.dns.is_empty() {
            given.dns
        } else {
            config.dns.clone()
        },
        extra: given.extra,
    }
    .after(config.prev_result.clone().unwrap_or_default())
}

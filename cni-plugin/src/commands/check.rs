//! CHECK: whether an attachment is as its ADD left it. What plugins later in the
//! chain may have changed (the MAC address, the MTU, more addresses) is not
//! looked at.

use std::{net::IpAddr, path::Path};

use crate::{
    attachment::{Attachment, Record},
    cni::{Call, CniError, CniResult, ErrorCode, result::IpConfig},
    datapath::{Datapath, FILTER_HANDLE, FILTER_PRIORITY},
    ipam::Ipam,
    link::{Hook, Netlink},
    masquerade,
    netns::Netns,
    ports, uplinks,
};

use super::{add, is_alive, open_sandbox};

/// Compares `prevResult` and the record with what there is.
pub(super) fn run(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    netns: &Path,
) -> Result<(), CniError> {
    let sandbox = open_sandbox(call, netns)?;
    let expected = call.config.prev_result.as_ref().ok_or_else(|| {
        CniError::new(
            ErrorCode::InvalidConfig,
            "prevResult is missing: CHECK compares with it",
        )
    })?;
    let number = own_interface(expected, attachment, &sandbox).ok_or_else(|| {
        fault(format!(
            "prevResult has no interface {:?} in sandbox {}",
            attachment.ifname,
            sandbox.path().display()
        ))
    })?;
    let ips: Vec<&IpConfig> = expected
        .ips
        .iter()
        .filter(|ip| ip.interface == Some(number))
        .collect();

    let host = Netlink::host()?;
    let record = attachment.peek().ok_or_else(|| {
        fault(format!(
            "container {} has no interface {} in network {} that this plugin made",
            attachment.container_id, attachment.ifname, attachment.network
        ))
    })?;
    if !is_alive(&host, attachment)? {
        return Err(fault(format!(
            "the host veth {} is missing",
            attachment.host_veth()
        )));
    }
    let datapath = Datapath::open()?
        .ok_or_else(|| fault("the maps that the attachment needs are not pinned".to_owned()))?;
    if let Some(what) = port(&host, &datapath, attachment, &record)? {
        return Err(fault(what));
    }
    if let Some(what) = translation(&datapath, &record)? {
        return Err(fault(what));
    }
    if record.outside().is_needed() {
        let lost = uplinks::check(&host, &datapath)?;
        // Told or not, it is put right.
        uplinks::follow(&host, &datapath, call.config, || Ok(record.outside()))?;
        if let Some(what) = lost {
            return Err(fault(what));
        }
    }
    check_gateway(call, &host, &record, &ips)?;
    check_inside(call, attachment, &sandbox, expected, &ips)?;
    let addresses: Vec<IpAddr> = ips.iter().map(|ip| ip.address.addr()).collect();
    Ipam::of(call).check(call, attachment, &addresses)
}

/// What is wrong with an attachment's port, if anything is.
pub(super) fn port(
    host: &Netlink,
    datapath: &Datapath,
    attachment: &Attachment<'_>,
    record: &Record,
) -> Result<Option<String>, CniError> {
    let name = attachment.host_veth();
    let carried = host.tc_bpf(
        record.host_ifindex,
        Hook::Ingress,
        FILTER_PRIORITY,
        FILTER_HANDLE,
    )?;
    let expected = datapath.program_id(record.log_level).ok();
    let own = carried.is_some_and(|carried| {
        expected.is_none_or(|expected| carried == expected)
            // An upgrade that was killed has left it, and it does what it should.
            || datapath.is_own_program(record.log_level, carried)
    });
    if !own {
        return Ok(Some(match carried {
            None => format!("the program on the host veth {name} is detached"),
            Some(other) => format!("the host veth {name} carries another program, of id {other}"),
        }));
    }
    let lost = |what: &str| Ok(Some(format!("the entry for {what} of {name} is missing")));
    if datapath
        .port(record.host_ifindex)?
        .is_none_or(|port| port.segment != record.segment)
    {
        return lost("the port");
    }
    if datapath
        .endpoint(record.segment, record.mac)?
        .is_none_or(|endpoint| endpoint.port != record.host_ifindex)
    {
        return lost("the MAC address");
    }
    for &address in &record.addresses {
        if datapath
            .neighbor(record.segment, address)?
            .is_none_or(|neighbor| neighbor.port != record.host_ifindex)
        {
            return lost(&format!("address {address}"));
        }
    }
    if datapath.segment(record.segment)?.is_none() {
        return lost("the segment");
    }
    if !datapath.has_joined(record.host_ifindex)? {
        return lost("what is flooded");
    }
    Ok(None)
}

/// What is wrong with what is translated for an attachment, if anything is.
pub(super) fn translation(
    datapath: &Datapath,
    record: &Record,
) -> Result<Option<String>, CniError> {
    match ports::check(datapath, record)? {
        None => masquerade::check(datapath, record),
        fault => Ok(fault),
    }
}

/// The gateway device is there, and has the addresses that pods are sent to.
fn check_gateway(
    call: &Call<'_>,
    host: &Netlink,
    record: &Record,
    ips: &[&IpConfig],
) -> Result<(), CniError> {
    let link = host
        .link_by_index(record.segment)?
        .filter(|link| link.name == record.bridge);
    let Some(link) = link else {
        return Err(fault(format!(
            "the gateway device {:?} is missing",
            record.bridge
        )));
    };
    if !call.config.is_gateway {
        return Ok(());
    }
    let present = host.addresses(link.index)?;
    for gateway in ips.iter().filter_map(|ip| ip.gateway) {
        if !present.iter().any(|address| address.net.addr() == gateway) {
            return Err(fault(format!(
                "the gateway device {:?} has lost its address {gateway}",
                record.bridge
            )));
        }
    }
    Ok(())
}

/// The container's interface has its addresses and its routes.
fn check_inside(
    call: &Call<'_>,
    attachment: &Attachment<'_>,
    sandbox: &Netns,
    expected: &CniResult,
    ips: &[&IpConfig],
) -> Result<(), CniError> {
    let name = attachment.ifname;
    let inside = Netlink::open(sandbox)?;
    let link = inside
        .link_by_name(name)?
        .ok_or_else(|| fault(format!("the container's interface {name:?} is missing")))?;
    if !link.up && !call.config.disable_container_interface {
        return Err(fault(format!("the container's interface {name:?} is down")));
    }
    let present = inside.addresses(link.index)?;
    for ip in ips {
        if !present.iter().any(|address| address.net == ip.address) {
            return Err(fault(format!(
                "the container's interface {name:?} has lost its address {}",
                ip.address
            )));
        }
    }
    if call.config.disable_container_interface {
        return Ok(());
    }
    for route in &expected.routes {
        // A next hop that is not in one of our subnets belongs to another plugin
        // of the chain.
        let ours = |gateway| ips.iter().any(|ip| ip.address.contains(&gateway));
        if route.gw.is_some_and(ours) {
            let route = add::as_link_route(route);
            if !inside.has_route(link.index, &route)? {
                return Err(fault(format!("the container has lost its {route}")));
            }
        }
    }
    Ok(())
}

/// The number of the container's interface in a result.
fn own_interface(
    result: &CniResult,
    attachment: &Attachment<'_>,
    sandbox: &Netns,
) -> Option<usize> {
    result.interfaces.iter().position(|interface| {
        interface.name == attachment.ifname
            && interface
                .sandbox
                .as_deref()
                .is_some_and(|path| Path::new(path) == sandbox.path())
    })
}

fn fault(what: String) -> CniError {
    CniError::internal(what)
}

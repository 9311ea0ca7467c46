//! Pods that say that an address of another is theirs: in every form that Linux believes
//! on a bridge.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_common::drops::DropReason;
use bpf_bridge_tests::{Frame, MacAddr, Namespace, Node, Outside, Packet, internet_checksum};
use serde_json::json;

use crate::{PATIENCE, SILENCE, Station, each, neighbour, network};

const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ADVERTISEMENT: u8 = 136;
const SOLICITATION: u8 = 135;
const DESTINATION_OPTIONS: u8 = 60;
const ROUTING: u8 = 43;

/// An ICMPv6 message with hop limit 255, behind extension headers of these types.
fn icmp6(
    to: (MacAddr, Ipv6Addr),
    from: (MacAddr, Ipv6Addr),
    extensions: &[u8],
    mut message: Vec<u8>,
) -> Frame {
    let pseudo = [
        &from.1.octets()[..],
        &to.1.octets(),
        &u32::try_from(message.len()).unwrap_or(0).to_be_bytes(),
        &[0, 0, 0, 58],
        &message,
    ]
    .concat();
    message[2..4].copy_from_slice(&internet_checksum(&pseudo).to_be_bytes());
    let mut payload = Vec::new();
    for at in 0..extensions.len() {
        let next = extensions.get(at + 1).copied().unwrap_or(58);
        // Padding in options; in a routing header a type that ends here.
        payload.extend([
            next,
            0,
            1,
            if extensions[at] == ROUTING { 0 } else { 4 },
            0,
            0,
            0,
            0,
        ]);
    }
    payload.extend(message);
    let length = u16::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let first = extensions.first().copied().unwrap_or(58);
    let packet = [
        &[0x60, 0, 0, 0, length[0], length[1], first, 255][..],
        &from.1.octets(),
        &to.1.octets(),
        &payload,
    ]
    .concat();
    Frame::ip(to.0, from.0, &packet)
}

/// An advertisement or a solicitation with the sender's link-layer address.
fn discovery(kind: u8, flags: u8, about: Ipv6Addr, at: MacAddr) -> Vec<u8> {
    let option = if kind == ADVERTISEMENT { 2 } else { 1 };
    let head = [kind, 0, 0, 0, flags, 0, 0, 0];
    [&head[..], &about.octets(), &[option, 1], &at.0].concat()
}

/// The frame with priority tags.
fn tagged(frame: &Frame, tags: usize) -> Frame {
    let tags = [0x81, 0, 0xe0, 0].repeat(tags);
    Frame([&frame.0[..12], &tags, &frame.0[12..]].concat())
}

/// Every way to tell `to` that `address` is at `liar`.
fn lies(liar: MacAddr, to: (MacAddr, IpAddr), address: IpAddr) -> Vec<(String, Frame)> {
    let mut lies = Vec::new();
    let mut add = |what: &str, frame: Frame| {
        for tags in 0..3 {
            lies.push((format!("{what}, {tags} tags"), tagged(&frame, tags)));
        }
    };
    match (address, to.1) {
        (IpAddr::V4(address), IpAddr::V4(victim)) => {
            let sender = (liar, address);
            add("an announcement", Frame::gratuitous_arp(liar, address));
            add(
                "an announcement as a question",
                Frame::arp(MacAddr::BROADCAST, 1, sender, (MacAddr([0; 6]), address)),
            );
            add("an answer", Frame::arp(to.0, 2, sender, (to.0, victim)));
            add(
                "a question",
                Frame::arp(to.0, 1, sender, (MacAddr([0; 6]), victim)),
            );
            let mut other = Frame::arp(to.0, 2, sender, (to.0, victim));
            other.0[15] = 6;
            add("an answer of IEEE 802 networks", other);
            let mut reserved = Frame::arp(to.0, 2, sender, (to.0, victim));
            reserved.0[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0x0e]);
            add("an answer to a reserved group", reserved);
        }
        (IpAddr::V6(address), IpAddr::V6(victim)) => {
            let (victim, all) = (
                (to.0, victim),
                (MacAddr::of_multicast(ALL_NODES), ALL_NODES),
            );
            let sender = (liar, address);
            for (what, to, flags) in [
                ("unsolicited, to all", all, 0x20),
                ("unsolicited", victim, 0x20),
                ("solicited", victim, 0x60),
                ("of a router", victim, 0xe0),
                ("that overrides nothing", victim, 0x40),
            ] {
                let message = || discovery(ADVERTISEMENT, flags, address, liar);
                add(
                    &format!("an advertisement {what}"),
                    icmp6(to, sender, &[], message()),
                );
                for extensions in [&[DESTINATION_OPTIONS][..], &[0], &[DESTINATION_OPTIONS; 9]] {
                    add(
                        &format!("an advertisement {what}, behind {extensions:?}"),
                        icmp6(to, sender, extensions, message()),
                    );
                }
            }
            let asks = discovery(SOLICITATION, 0, victim.1, liar);
            add("a question", icmp6(victim, sender, &[], asks.clone()));
            add(
                "a question behind options",
                icmp6(victim, sender, &[DESTINATION_OPTIONS], asks),
            );
            let routers = [&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1][..], &liar.0].concat();
            add(
                "a question for routers",
                icmp6(victim, sender, &[], routers),
            );
        }
        _ => {}
    }
    lies
}

/// Lets a namespace take up addresses that it never asked for, as an operator may.
fn make_gullible(namespace: &Namespace, device: &str) -> Result<()> {
    namespace.set_sysctl(&format!("net/ipv4/conf/{device}/arp_accept"), "1")?;
    namespace.set_sysctl(&format!("net/ipv6/conf/{device}/accept_untracked_na"), "1")?;
    Ok(())
}

/// Tells `victim` all lies about whose `address` is, and sees that it believes none.
fn is_not_believed(
    liar: &Station,
    victim: (&Namespace, &str, MacAddr, IpAddr),
    address: IpAddr,
    truth: MacAddr,
) -> Result<u64> {
    let (namespace, device, mac, own) = victim;
    let mut sent = 0;
    for known in [true, false] {
        for (what, frame) in lies(liar.mac, (mac, own), address) {
            if known {
                namespace.ping(address, 1)?;
            } else {
                namespace.ip(&format!("neigh flush to {address}"))?;
            }
            liar.socket.send(&frame).context(what.clone())?;
            sent += 1;
            thread::sleep(std::time::Duration::from_millis(3));
            let believed = neighbour(namespace, address, device)?;
            ensure!(
                believed.is_none_or(|believed| believed == truth),
                "{what}: {address} is at {believed:?}, not {truth}"
            );
        }
    }
    namespace.ping(address, 2)?;
    // What is said to the address must not be heard by the liar.
    let heard = liar.socket.receive(SILENCE, |frame| {
        frame.source() == mac
            && matches!(frame.ethertype(), Frame::IPV4 | Frame::IPV6)
            && !frame.for_other
            && frame.bytes.get(..6) == Some(&liar.mac.0[..])
    })?;
    ensure!(heard.is_none(), "the liar hears {heard:?}");
    Ok(sent)
}

#[test]
fn nobody_takes_a_pods_address() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let stations = ["liar", "victim", "owner"].map(|name| Station::new(&network, name));
    let [liar, victim, owner] = stations;
    let (liar, victim, owner) = (liar?, victim?, owner?);
    make_gullible(&victim.pod, "eth0")?;
    make_gullible(&node, "cni0")?;
    let gateway = MacAddr::of_device(&node, "cni0")?;
    let own = victim.addresses()?;
    for (family, address) in owner.addresses()?.into_iter().enumerate() {
        let before = liar.drops(&node, DropReason::Claimed)?;
        let mut sent = is_not_believed(
            &liar,
            (&victim.pod, "eth0", victim.mac, own[family]),
            address,
            owner.mac,
        )?;
        sent += is_not_believed(
            &liar,
            (&node, "cni0", gateway, GATEWAYS[family]),
            address,
            owner.mac,
        )?;
        let counted = liar.drops(&node, DropReason::Claimed)? - before;
        ensure!(
            counted == sent,
            "{counted} of {sent} lies about {address} are counted"
        );
    }
    Ok(())
}

#[test]
fn nobody_takes_the_gateways_address() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let (liar, victim) = (
        Station::new(&network, "liar")?,
        Station::new(&network, "victim")?,
    );
    make_gullible(&victim.pod, "eth0")?;
    let gateway = MacAddr::of_device(&node, "cni0")?;
    let own = victim.addresses()?;
    for (family, address) in GATEWAYS.into_iter().enumerate() {
        let before = liar.drops(&node, DropReason::Claimed)?;
        let sent = is_not_believed(
            &liar,
            (&victim.pod, "eth0", victim.mac, own[family]),
            address,
            gateway,
        )?;
        let counted = liar.drops(&node, DropReason::Claimed)? - before;
        ensure!(
            counted == sent,
            "{counted} of {sent} lies about {address} are counted"
        );
    }
    Ok(())
}

/// Link-local addresses follow from MAC addresses, which are assigned.
#[test]
fn nobody_takes_a_link_local_address() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let stations = ["liar", "victim", "owner"].map(|name| Station::new(&network, name));
    let [liar, victim, owner] = stations;
    let (liar, victim, owner) = (liar?, victim?, owner?);
    let local = |mac: MacAddr| -> Result<Ipv6Addr> {
        let [a, b, c, d, e, f] = mac.0;
        Ok(format!(
            "fe80::{:x}:{:x}:{:x}:{:x}",
            u16::from_be_bytes([a ^ 2, b]),
            u16::from_be_bytes([c, 0xff]),
            u16::from_be_bytes([0xfe, d]),
            u16::from_be_bytes([e, f])
        )
        .parse()?)
    };
    for mac in [owner.mac, MacAddr::of_device(&node, "cni0")?] {
        let address = local(mac)?;
        let scoped = format!("{address}%eth0");
        victim.pod.run(&format!("ping -c 1 -W 2 {scoped}"))?;
        for (what, frame) in lies(
            liar.mac,
            (victim.mac, local(victim.mac)?.into()),
            address.into(),
        ) {
            liar.socket.send(&frame)?;
            thread::sleep(std::time::Duration::from_millis(3));
            let believed = neighbour(&victim.pod, address.into(), "eth0")?;
            ensure!(
                believed == Some(mac),
                "{what}: {address} is at {believed:?}, not {mac}"
            );
        }
    }
    Ok(())
}

/// keepalived's way: the address was assigned to nobody, and whoever announces it has it.
#[test]
fn an_address_that_nobody_was_assigned_goes_to_who_announces_it() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let stations = ["client", "first", "second"].map(|name| Station::new(&network, name));
    let [client, first, second] = stations;
    let (client, first, second) = (client?, first?, second?);
    let v4: Ipv4Addr = "10.77.200.9".parse()?;
    let v6: Ipv6Addr = "fd77::c8:9".parse()?;
    for station in [&first, &second, &first] {
        for other in [&first, &second] {
            let _ = other.pod.ip(&format!("addr del {v4}/32 dev eth0"));
            let _ = other.pod.ip(&format!("addr del {v6}/128 dev eth0"));
        }
        station.pod.ip(&format!(
            "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad"
        ))?;
        station
            .socket
            .send(&Frame::gratuitous_arp(station.mac, v4))?;
        station
            .socket
            .send(&Frame::unsolicited_advertisement(station.mac, v6))?;
        for address in [IpAddr::V4(v4), v6.into()] {
            client.pod.ping(address, 1)?;
            let believed = neighbour(&client.pod, address, "eth0")?;
            ensure!(
                believed == Some(station.mac),
                "{address} is at {believed:?}"
            );
        }
    }
    for station in [&first, &second] {
        let drops = station.drops(&node, DropReason::Claimed)?;
        ensure!(drops == 0, "{drops} announcements were dropped");
    }
    Ok(())
}

#[test]
fn duplicate_address_detection_works_both_ways() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({"enabledad": true}));
    let (owner, liar) = (
        Station::new(&network, "owner")?,
        Station::new(&network, "liar")?,
    );
    // Whoever takes an assigned address finds out.
    let taken = owner.pod.v6()?;
    liar.pod.ip(&format!("addr add {taken}/64 dev eth0"))?;
    bpf_bridge_tests::wait_for("duplicate", PATIENCE, || {
        let shown = liar
            .pod
            .json(&format!("ip -j addr show dev eth0 to {taken}"))?;
        Ok(shown.to_string().contains("dadfailed"))
    })?;
    liar.pod.ip(&format!("addr del {taken}/64 dev eth0"))?;

    // And so does whoever is given one that somebody has.
    let next = after(liar.pod.v6()?, 1);
    let stop = AtomicBool::new(false);
    let error = thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                liar.socket
                    .send(&Frame::unsolicited_advertisement(liar.mac, next))?;
                thread::sleep(std::time::Duration::from_millis(2));
            }
            Ok(())
        });
        let added = network.pod("next");
        stop.store(true, Ordering::Relaxed);
        sender
            .join()
            .map_err(|_| anyhow::anyhow!("the sender failed"))??;
        added.err().context("a duplicate was assigned")
    })?;
    let error = format!("{error:#}");
    ensure!(
        error.contains("duplicate") && error.contains(&next.to_string()),
        "{error}"
    );
    // From the end of the detection on it is nobody else's.
    let new = Station::new(&network, "new")?;
    let before = liar.drops(&node, DropReason::Claimed)?;
    liar.socket
        .send(&Frame::unsolicited_advertisement(liar.mac, new.pod.v6()?))?;
    ensure!(liar.drops(&node, DropReason::Claimed)? == before + 1);
    owner.pod.ping(new.pod.v6()?.into(), 1)
}

/// The address so many after another.
fn after(address: Ipv6Addr, more: u128) -> Ipv6Addr {
    Ipv6Addr::from_bits(address.to_bits() + more)
}

#[test]
fn what_was_said_before_an_address_was_assigned_is_corrected() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({}));
    let (victim, liar) = (
        Station::new(&network, "victim")?,
        Station::new(&network, "liar")?,
    );
    // What will be assigned next is no secret.
    let (v4, v6) = (liar.pod.v4()?, liar.pod.v6()?);
    let next = [
        IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() + 1)),
        IpAddr::V6(after(v6, 1)),
    ];
    for (address, own) in next.into_iter().zip(victim.addresses()?) {
        for (what, frame) in lies(liar.mac, (victim.mac, own), address) {
            liar.socket.send(&frame).context(what)?;
        }
        bpf_bridge_tests::wait_for("a neighbour", PATIENCE, || {
            Ok(neighbour(&victim.pod, address, "eth0")? == Some(liar.mac))
        })?;
    }
    let owner = Station::new(&network, "owner")?;
    ensure!(
        owner.addresses()? == next,
        "the test guessed other addresses"
    );
    for address in next {
        bpf_bridge_tests::wait_for("the truth", PATIENCE, || {
            Ok(neighbour(&victim.pod, address, "eth0")? == Some(owner.mac))
        })?;
        victim.pod.ping(address, 1)?;
    }
    Ok(())
}

/// RA with a router's lifetime, a prefix and a link-layer address.
fn router_advertisement(mac: MacAddr, source: Ipv6Addr, to: (MacAddr, Ipv6Addr)) -> Frame {
    let prefix: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 0);
    let message = [
        &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1][..],
        &mac.0,
        &[3, 4, 64, 0xc0, 0, 0, 7, 8, 0, 0, 7, 8, 0, 0, 0, 0],
        &prefix.octets(),
    ]
    .concat();
    icmp6(to, (mac, source), &[], message)
}

fn has_router(namespace: &Namespace) -> Result<bool> {
    let shown = namespace.run("ip -6 route show")? + &namespace.run("ip -6 addr show")?;
    Ok(shown.contains("proto ra") || shown.contains("2001:db8:bad"))
}

#[test]
fn a_pod_is_nobodys_router_where_there_is_a_gateway() -> Result<()> {
    each([true, false], |gateway| {
        let _peace = crate::peace();
        let node = Node::new()?;
        let network = network(
            &node,
            &json!({"isDefaultGateway": gateway, "isGateway": gateway}),
        );
        let (liar, victim) = (
            Station::new(&network, "liar")?,
            Station::new(&network, "victim")?,
        );
        victim.pod.set_sysctl("net/ipv6/conf/eth0/accept_ra", "2")?;
        let all = (MacAddr::of_multicast(ALL_NODES), ALL_NODES);
        let local: Ipv6Addr = "fe80::1234".parse()?;
        for to in [
            all,
            (victim.mac, victim.pod.v6()?),
            (MacAddr::of_device(&node, "cni0")?, ALL_NODES),
        ] {
            for tags in 0..2 {
                let frame = router_advertisement(liar.mac, local, to);
                liar.socket.send(&tagged(&frame, tags))?;
            }
        }
        if gateway {
            thread::sleep(SILENCE * 3);
            ensure!(!has_router(&victim.pod)?, "the pod believes it");
            let drops = liar.drops(&node, DropReason::Claimed)?;
            ensure!(drops == 6, "{drops} of 6 are counted");
        } else {
            bpf_bridge_tests::wait_for("router, as on a bridge", PATIENCE, || {
                has_router(&victim.pod)
            })?;
        }
        ensure!(!has_router(&node)?, "the node believes it");
        Ok(())
    })
}

/// An IPv4 redirect of a packet from `victim` to `remote`: by way of `to`.
fn redirect(
    from: (MacAddr, Ipv4Addr),
    victim: (MacAddr, Ipv4Addr),
    remote: Ipv4Addr,
    to: Ipv4Addr,
) -> Frame {
    let quoted = Packet::udp((victim.1, 1).into(), (remote, 1).into(), &[]).bytes();
    let mut quoted = quoted;
    // The answer to a ping: Linux does not ask whether it has sent it.
    quoted[9] = 1;
    quoted[20..28].copy_from_slice(&[0, 0, 0, 0, 0, 1, 0, 1]);
    quoted[10..12].fill(0);
    let sum = internet_checksum(&quoted[..20]);
    quoted[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut message = [&[5, 1, 0, 0][..], &to.octets(), &quoted].concat();
    let sum = internet_checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = u16::try_from(20 + message.len()).unwrap_or(0).to_be_bytes();
    let mut header = [
        &[0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, 1, 0, 0][..],
        &from.1.octets(),
        &victim.1.octets(),
    ]
    .concat();
    let sum = internet_checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    Frame::ip(victim.0, from.0, &[header, message].concat())
}

#[test]
fn no_pod_redirects_another_or_the_node() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let _outside = node.outside()?;
    let network = network(&node, &json!({}));
    let (liar, victim) = (
        Station::new(&network, "liar")?,
        Station::new(&network, "victim")?,
    );
    victim
        .pod
        .set_sysctl("net/ipv4/conf/all/accept_redirects", "1")?;
    victim
        .pod
        .set_sysctl("net/ipv4/conf/eth0/accept_redirects", "1")?;
    victim.pod.ping(liar.pod.v4()?.into(), 1)?;
    let IpAddr::V4(gateway) = GATEWAYS[0] else {
        unreachable!("the first one is of IPv4");
    };
    let frame = redirect(
        (liar.mac, gateway),
        (victim.mac, victim.pod.v4()?),
        Outside::V4,
        liar.pod.v4()?,
    );
    let via = || victim.pod.run(&format!("ip route get {}", Outside::V4));
    let before = via()?;
    ensure!(before.contains(&gateway.to_string()), "{before}");
    for tags in 0..2 {
        liar.socket.send(&tagged(&frame, tags))?;
        thread::sleep(SILENCE);
        let after = via()?;
        ensure!(after.contains(&gateway.to_string()), "{after}");
    }
    let drops = liar.drops(&node, DropReason::Claimed)?;
    ensure!(drops == 2, "{drops} of 2 are counted");

    // The node itself believes none even if one came through.
    for setting in [
        "net/ipv4/conf/cni0/accept_redirects",
        "net/ipv6/conf/cni0/accept_redirects",
        "net/ipv6/conf/cni0/accept_ra",
    ] {
        let value = node.sysctl(setting)?;
        ensure!(value.trim() == "0", "{setting} is {value}");
    }
    Ok(())
}

#[test]
fn macspoofchk_refuses_another_pods_ip_source() -> Result<()> {
    let _peace = crate::peace();
    let node = Node::new()?;
    let network = network(&node, &json!({"macspoofchk": true}));
    let stations = ["liar", "victim", "owner"].map(|name| Station::new(&network, name));
    let [liar, victim, owner] = stations;
    let (liar, victim, owner) = (liar?, victim?, owner?);
    let gateway = MacAddr::of_device(&node, "cni0")?;
    let sees = |mac: MacAddr, source: IpAddr, to: IpAddr, tags| -> Result<bool> {
        let packet = Packet::udp((source, 7).into(), (to, 7).into(), b"as another").bytes();
        let frame = tagged(&Frame::ip(mac, liar.mac, &packet), tags);
        liar.socket.send(&frame)?;
        let seen = victim
            .socket
            .receive(SILENCE, |seen| seen.bytes.ends_with(b"as another"))?;
        Ok(seen.is_some())
    };
    let (own, to) = (liar.addresses()?, victim.addresses()?);
    let others = owner.addresses()?;
    for family in [0, 1] {
        for tags in 0..2 {
            for source in [others[family], GATEWAYS[family], to[family]] {
                // By way of the host as well, which forwards.
                for mac in [victim.mac, gateway] {
                    let before = liar.drops(&node, DropReason::Spoofed)?;
                    ensure!(!sees(mac, source, to[family], tags)?, "{source} passes");
                    let counted = liar.drops(&node, DropReason::Spoofed)? - before;
                    ensure!(counted == 1, "{source} is counted {counted} times");
                }
            }
            ensure!(
                sees(victim.mac, own[family], to[family], tags)?,
                "its own is refused"
            );
        }
        let nobodys: IpAddr = ["10.77.200.1", "fd77::c8:1"][family].parse()?;
        ensure!(
            sees(victim.mac, nobodys, to[family], 0)?,
            "nobody's is refused"
        );
    }
    Ok(())
}

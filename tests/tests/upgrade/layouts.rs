//! Another layout of the maps: a later one, to which everything is carried over, and an
//! earlier one, to which nothing can be.

use std::{
    collections::BTreeSet, fs, net::TcpStream, os::unix::process::ExitStatusExt as _, path::Path,
    process::Command, time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Network, Node, Outside, Pod, plugin_binary};
use serde_json::{Value, json};

use crate::{
    HOST_PORT, another_build, entries, install, is_well, layouts, load::Stage, network,
    next_binary, ports, program_of, upgrade, upgrade_error,
};

/// Long enough for anything that does happen, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);

/// Maps that only the plugin writes, of which nothing may change but their layout.
const CONFIGURED: [&str; 9] = [
    "PORTS",
    "ENDPOINTS",
    "NEIGHBORS",
    "SEGMENTS",
    "MEMBERS",
    "PUBLISHED",
    "MASQUERADED",
    "ADDRESSES",
    "UPLINKS",
];

/// The configured maps' entries, without what only the next layout has.
fn configured(node: &Node, layout: &str) -> Result<Vec<(&'static str, BTreeSet<String>)>> {
    CONFIGURED
        .into_iter()
        .map(|map| {
            let entries = entries(node, layout, map)?;
            let entries = entries.into_iter().map(|mut entry| {
                let mut entry = entry["formatted"].take();
                if let Some(value) = entry["value"].as_object_mut() {
                    value.remove("next");
                }
                entry.to_string()
            });
            Ok((map, entries.collect()))
        })
        .collect()
}

/// How many neighbour requests the ports of a layout have answered.
fn answers(node: &Node, layout: &str) -> Result<u64> {
    let all = entries(node, layout, "STATS")?;
    Ok(all
        .iter()
        .flat_map(|entry| entry["formatted"]["values"].as_array())
        .flatten()
        .filter_map(|cpu| cpu["value"]["answered"].as_u64())
        .sum())
}

fn carried_under_load(xdp: bool) -> Result<()> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, xdp)?;
    let pods = [&stage.server, &stage.client];
    let before = configured(&node, "v1")?;
    ensure!(before.iter().all(|(_, entries)| !entries.is_empty()));
    install(&node, &next_binary()?)?;
    stage.under_load(false, || {
        let seen = answers(&node, "v1")?;
        let words = upgrade(&node)?;
        ensure!(words.contains("carried over from the layout v1"), "{words}");
        ensure!(words.contains("in use on 3 ports"), "{words}");
        ensure!(layouts(&node)? == ["v2"], "{:?}", layouts(&node)?);
        let (then, now) = (seen, answers(&node, "v2")?);
        ensure!(
            now >= then && then > 0,
            "of {then} answers {now} were carried over"
        );
        is_well(&stage.network, &pods)
    })?;
    let after = configured(&node, "v2")?;
    ensure!(before == after, "{before:?} became {after:?}");
    stage.under_load(true, || {
        install(&node, &another_build(&next_binary()?, 1)?)?;
        let words = upgrade(&node)?;
        ensure!(words.contains("replaced"), "{words}");
        is_well(&stage.network, &pods)
    })?;
    stage.carries_everything()?;
    // What one binary has attached, the other detaches.
    for pod in pods {
        stage.network.del(pod.attachment())?;
    }
    ensure!(entries(&node, "v2", "PORTS")?.len() == 1);
    for map in ["PUBLISHED", "MASQUERADED"] {
        ensure!(entries(&node, "v2", map)?.is_empty(), "{map} is not empty");
    }
    Ok(())
}

#[test]
fn a_later_one_gets_all_ports_and_flows() -> Result<()> {
    carried_under_load(false)
}

#[test]
fn a_later_one_gets_all_ports_and_flows_with_xdp() -> Result<()> {
    carried_under_load(true)
}

/// A network of pods alone: its programs are loaded in no time.
fn plain(node: &Node) -> Network<'_> {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config["isDefaultGateway"] = json!(false);
    Network::new(node, config)
}

/// Two pods that the plugin under test has attached, and which talk.
fn attached<'n>(node: &'n Node) -> Result<(Network<'n>, Pod, Pod)> {
    let network = plain(node);
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    a.ping(b.v4()?.into(), 1)?;
    Ok((network, a, b))
}

/// Whoever calls the later binary first has it carry everything over: `verb`, which leaves
/// the second pod as it is.
fn carried_by(verb: impl FnOnce(&Network, &Pod, &Pod) -> Result<()>) -> Result<()> {
    let node = Node::new()?;
    let (network, a, b) = attached(&node)?;
    install(&node, &next_binary()?)?;
    verb(&network, &a, &b)?;
    ensure!(layouts(&node)? == ["v2"], "{:?}", layouts(&node)?);
    is_well(&network, &[&b])?;
    let c = network.pod("c")?;
    c.ping(b.v4()?.into(), 1)?;
    c.ping(b.v6()?.into(), 1)
}

#[test]
fn an_add_carries_over() -> Result<()> {
    carried_by(|network, a, _| network.pod("new")?.ping(a.v4()?.into(), 1))
}

/// That of the first pod nothing is left: there are the gateway's port and the other pod's.
fn is_alone(network: &Network) -> Result<()> {
    let node = network.node();
    ensure!(entries(node, "v2", "PORTS")?.len() == 2);
    ensure!(entries(node, "v2", "MEMBERS")?.len() == 2);
    ensure!(entries(node, "v2", "NEIGHBORS")?.len() == 2);
    Ok(())
}

#[test]
fn a_del_carries_over() -> Result<()> {
    carried_by(|network, a, _| {
        network.del(a.attachment())?;
        is_alone(network)
    })
}

#[test]
fn a_gc_carries_over() -> Result<()> {
    carried_by(|network, _, b| {
        network.gc(&[b.attachment()])?;
        is_alone(network)
    })
}

#[test]
fn a_check_carries_over() -> Result<()> {
    carried_by(|network, a, _| network.check(a.attachment()))
}

#[test]
fn a_status_carries_over() -> Result<()> {
    carried_by(|network, _, _| is_well(network, &[]))
}

/// That an error says what cannot be done, and what can.
fn refuses_to_go_back(words: &str) -> Result<()> {
    for word in [
        "newer bpf-bridge",
        "layout 2",
        "layout 1",
        "remove all pods",
        "bpf-bridge/v2",
    ] {
        ensure!(words.contains(word), "no {word:?} in {words}");
    }
    Ok(())
}

#[test]
fn an_earlier_one_is_refused_but_for_del() -> Result<()> {
    let node = Node::new()?;
    let released = plugin_binary()?;
    install(&node, &next_binary()?)?;
    let network = network(&node, false);
    let kept = network.pod("kept")?;
    let gone = network.pod_with_ports("gone", ports())?;
    let program = program_of(&node, &kept)?;
    install(&node, &released)?;

    refuses_to_go_back(&upgrade_error(&node)?)?;
    let new = node.sandbox("new")?;
    let error = network
        .add(&new.attachment())
        .err()
        .context("ADD went well")?;
    refuses_to_go_back(&format!("{error:#}"))?;
    ensure!(new.device_names()? == ["lo"], "{:?}", new.device_names()?);
    let error = network
        .check(kept.attachment())
        .err()
        .context("CHECK went well")?;
    refuses_to_go_back(&format!("{error:#}"))?;
    let error = network.gc(&[kept.attachment(), gone.attachment()]);
    refuses_to_go_back(&format!("{:#}", error.err().context("GC went well")?))?;
    let error = network.status()?.remove(0).failure()?;
    ensure!(error.code == 50, "STATUS says {error:?}");
    refuses_to_go_back(&error.text())?;
    // Who is attached suffers from none of it.
    ensure!(program_of(&node, &kept)? == program);
    kept.ping(gone.v4()?.into(), 1)?;

    // DEL does what it can: a node must get empty.
    let config = network.configs(Some(gone.attachment()))?.remove(0);
    let reply = network
        .call(&config, bpf_bridge_tests::Verb::Del)?
        .attachment(gone.attachment())
        .run(&node)?;
    reply.success()?;
    refuses_to_go_back(&reply.stderr)?;
    ensure!(gone.device_names()? == ["lo"], "{:?}", gone.device_names()?);
    let leases = node.run("ls /var/lib/cni/networks/net")?;
    ensure!(!leases.contains(&gone.v4()?.to_string()), "{leases}");
    let records = node.run("ls /run/bpf-bridge/attachments/net")?;
    ensure!(!records.contains("gone"), "{records}");
    ensure!(!entries(&node, "v2", "PUBLISHED")?.is_empty());

    // What it has left, the later one's GC removes.
    install(&node, &next_binary()?)?;
    network.gc(&[kept.attachment()])?;
    ensure!(entries(&node, "v2", "PUBLISHED")?.is_empty());
    is_well(&network, &[&kept])?;

    // And without pods and pins the earlier one begins anew.
    install(&node, &released)?;
    network.del(kept.attachment())?;
    node.run(&format!("rm -r {}/v2", crate::ROOT))?;
    node.run("ip link delete cni0")?;
    let again = network.pod("again")?;
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    is_well(&network, &[&again])
}

/// Runs `bpf-bridge upgrade` with a fault; says whether it was killed.
fn upgrade_with(node: &Node, fault: &str) -> Result<bool> {
    let mut command = Command::new(format!("{}/{}", Node::CNI_PATH, node.plugin()));
    let output = node.output(command.arg("upgrade").env("BPF_BRIDGE_FAULT", fault))?;
    ensure!(
        output.status.success() || output.status.signal() == Some(9),
        "{fault}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(!output.status.success())
}

/// What an upgrade changes, one after the other.
fn points(node: &Node) -> Result<Vec<String>> {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "upgrade-points-{}-{}",
        std::process::id(),
        node_number()
    ));
    ensure!(!upgrade_with(node, &format!("list:{}", path.display()))?);
    let all = fs::read_to_string(&path)?;
    fs::remove_file(path)?;
    Ok(all
        .lines()
        .filter_map(|line| line.strip_prefix("point "))
        .map(str::to_owned)
        .collect())
}

/// Which of the points of an upgrade with everything, to the next layout, ends in these words.
fn point(words: &str) -> Result<usize> {
    let node = Node::new()?;
    let outside = node.outside()?;
    let _stage = Stage::new(&node, &outside, false)?;
    install(&node, &next_binary()?)?;
    let all = points(&node)?;
    let found = all.iter().position(|point| point.ends_with(words));
    Ok(found.with_context(|| format!("no {words} in {all:?}"))? + 1)
}

/// Tells files of tests apart that run at once.
fn node_number() -> usize {
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// An upgrade that is killed harms nobody, and the next call goes on: an ADD or another
/// upgrade, in turn.
#[test]
fn killed_anywhere_it_is_completed() -> Result<()> {
    let next = next_binary()?;
    let count = {
        let node = Node::new()?;
        attached(&node)?;
        install(&node, &next)?;
        points(&node)?.len()
    };
    ensure!(count > 20, "only {count} points");
    for point in 1..=count {
        let node = Node::new()?;
        let (network, a, b) = attached(&node)?;
        install(&node, &next)?;
        let check = || {
            ensure!(upgrade_with(&node, &format!("kill:{point}"))?, "not killed");
            a.ping(b.v4()?.into(), 1).context("before the next call")?;
            if point % 2 == 0 {
                upgrade(&node)?;
            } else {
                network.pod("c")?.ping(a.v6()?.into(), 1)?;
            }
            ensure!(layouts(&node)? == ["v2"], "{:?}", layouts(&node)?);
            is_well(&network, &[&a, &b])?;
            b.ping(a.v4()?.into(), 1)
        };
        check().with_context(|| format!("killed at {point} of {count}"))?;
    }
    Ok(())
}

/// The same with everything that a network can have, at points far apart.
fn killed_with_everything(from: &Path, to: &Path, mixed: bool) -> Result<()> {
    let node = Node::with_plugin(from)?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, mixed)?;
    let pods = [&stage.server, &stage.client];
    stage.carries_everything()?;
    install(&node, to)?;
    if !mixed {
        // All that says so is there, but the layout is not complete.
        let last = point("replace /sys/fs/bpf/bpf-bridge/v2/off/port")?;
        ensure!(upgrade_with(&node, &format!("kill:{last}"))?);
        stage.carries_everything()?;
    }
    // Each time it is killed some way after where it went on the time before.
    for point in [3, 20, 40, 33, 27, 21, 14, 8, 5, 2] {
        if !upgrade_with(&node, &format!("kill:{point}"))? {
            continue;
        }
        let works = || {
            stage.carries_everything()?;
            // Programs of two builds of one layout are as they should be.
            if mixed {
                is_well(&stage.network, &pods)
            } else {
                Ok(())
            }
        };
        works().with_context(|| format!("after one that was killed at {point}"))?;
    }
    upgrade(&node)?;
    is_well(&stage.network, &pods)?;
    stage.under_load(true, || {
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    })
}

#[test]
fn killed_with_everything_it_is_completed() -> Result<()> {
    killed_with_everything(&plugin_binary()?, &next_binary()?, false)
}

#[test]
fn killed_within_one_layout_it_is_completed() -> Result<()> {
    let next = next_binary()?;
    killed_with_everything(&next, &another_build(&next, 7)?, true)
}

/// What old programs write after the first copy is not forgotten: a flow that begins, a port
/// that masquerade has used, and that the host's stack has brought a pod a flow.
#[test]
fn what_is_written_meanwhile_is_carried_over() -> Result<()> {
    // The moment in which the new maps are in use, and no hook has its new program.
    let begun = point("v2/unfinished")?;
    let node = Node::new()?;
    let outside = node.outside()?;
    let stage = Stage::new(&node, &outside, false)?;
    let pods = [&stage.server, &stage.client];
    install(&node, &next_binary()?)?;
    ensure!(upgrade_with(&node, &format!("kill:{begun}"))?);
    ensure!(layouts(&node)? == ["v1", "v2"], "{:?}", layouts(&node)?);

    let published = (Outside::NODE_V4, HOST_PORT).into();
    let stream = outside.within(|| Ok(TcpStream::connect_timeout(&published, PATIENCE)?))?;
    let port = stream.local_addr()?.port();
    let known = |layout| -> Result<bool> {
        let flows = entries(&node, layout, "FLOWS")?;
        Ok(flows
            .iter()
            .any(|flow| flow["formatted"]["key"]["client_port"] == port))
    };
    ensure!(known("v1")? && !known("v2")?);
    let maps = format!("{}/v1/maps", crate::ROOT);
    node.run(&format!(
        "bpftool map update pinned {maps}/USED key hex 07 00 00 00 value hex 01 02 03 04 05 06 07 08"
    ))?;
    let ports = entries(&node, "v1", "PORTS")?;
    let address = stage.client.v4()?;
    let index = node.device(stage.client.host_veth()?)?["ifindex"].clone();
    let entry = ports
        .iter()
        .find(|entry| entry["formatted"]["key"] == index)
        .with_context(|| format!("no port of {address}"))?;
    let hex = |bytes: &Value| -> Result<Vec<String>> {
        let bytes = bytes.as_array().context("no bytes")?;
        bytes
            .iter()
            .map(|byte| Ok(byte.as_str().context("no byte")?.replace("0x", "")))
            .collect()
    };
    let (key, mut value) = (hex(&entry["key"])?, hex(&entry["value"])?);
    // `PORT_ROUTED`, in the second word.
    let flags = u8::from_str_radix(&value[4], 16)? | 0x80;
    value[4] = format!("{flags:02x}");
    node.run(&format!(
        "bpftool map update pinned {maps}/PORTS key hex {} value hex {}",
        key.join(" "),
        value.join(" ")
    ))?;

    upgrade(&node)?;
    ensure!(layouts(&node)? == ["v2"], "{:?}", layouts(&node)?);
    ensure!(known("v2")?, "the flow of port {port} is forgotten");
    let used = &entries(&node, "v2", "USED")?[7]["formatted"]["value"];
    ensure!(used.as_u64() == Some(0x0807_0605_0403_0201), "{used}");
    for map in ["PORTS", "ENDPOINTS"] {
        let routed = entries(&node, "v2", map)?
            .iter()
            .filter_map(|entry| entry["formatted"]["value"]["flags"].as_u64())
            .filter(|flags| flags & 0x80 != 0)
            .count();
        ensure!(routed == 1, "{map} has {routed} such ports");
    }
    is_well(&stage.network, &pods)
}

/// An entry that has no place in the new layout is told of, and nothing changes.
#[test]
fn what_is_no_map_of_ours_is_not_carried_over() -> Result<()> {
    let node = Node::new()?;
    let (network, a, b) = attached(&node)?;
    let before = program_of(&node, &a)?;
    let maps = format!("{}/v1/maps", crate::ROOT);
    node.run(&format!("mv {maps}/LEARNED {maps}/aside"))?;
    node.run(&format!(
        "bpftool map create {maps}/LEARNED type hash key 4 value 4 entries 16 name LEARNED"
    ))?;
    node.run(&format!(
        "bpftool map update pinned {maps}/LEARNED key hex 01 00 00 00 value hex 02 00 00 00"
    ))?;
    install(&node, &next_binary()?)?;
    let words = upgrade_error(&node)?;
    for word in ["LEARNED", "layout v1", "nothing was changed"] {
        ensure!(words.contains(word), "no {word:?} in {words}");
    }
    ensure!(layouts(&node)? == ["v1"], "{:?}", layouts(&node)?);
    ensure!(program_of(&node, &a)? == before);
    a.ping(b.v4()?.into(), 1)?;
    node.run(&format!("mv {maps}/aside {maps}/LEARNED"))?;
    upgrade(&node)?;
    is_well(&network, &[&a, &b])
}

/// What [`entries`] shows of a map without type information has no "formatted".
#[test]
fn maps_say_what_is_in_them() -> Result<()> {
    let node = Node::new()?;
    let (_network, ..) = attached(&node)?;
    let entry: &Value = &entries(&node, "v1", "PORTS")?[0]["formatted"];
    ensure!(entry["value"]["segment"].is_u64(), "{entry}");
    Ok(())
}

//! From ADD to DEL when things go wrong: what is left behind, who is harmed, and
//! what CHECK, GC and STATUS find.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bpf_bridge_tests::{
    Attachment, Call, EchoServer, Network, Node, Pod, Reply, Snapshot, Tables, Verb, at_once,
    wait_for,
};
use serde_json::{Value, json};

const LEASES: &str = "/var/lib/cni/networks/net";

/// A configuration of version 1.1.0, so that all verbs are allowed.
fn config(node: &Node) -> Value {
    let mut config = Network::dual_stack(node);
    // The stock plugins of Debian know no 1.1.0: with them, what needs it fails.
    if node.plugin() != "bridge" {
        config["cniVersion"] = json!("1.1.0");
    }
    config
}

/// A configuration with this many IPv4 addresses for pods, and no IPv6.
fn small(node: &Node, addresses: u8) -> Value {
    let mut config = config(node);
    config["ipam"]["ranges"] = json!([[{
        "subnet": Network::V4_SUBNET,
        "rangeStart": "10.77.0.10",
        "rangeEnd": format!("10.77.0.{}", 9 + addresses),
    }]]);
    config
}

/// What a node has after the first pod has come and gone: the gateway device,
/// the programs and their maps, empty lock files.
fn warm(network: &Network) -> Result<Snapshot> {
    let pod = network.pod("warm-up")?;
    network.del(pod.attachment())?;
    drop(pod);
    Snapshot::take(network.node())
}

/// A call with the first plugin's configuration, without `prevResult`.
fn call(network: &Network, verb: Verb, attachment: &Attachment) -> Result<Call> {
    let configs = network.configs(Some(attachment))?;
    let config = configs.first().context("an empty list")?;
    Ok(network.call(config, verb)?.attachment(attachment))
}

fn alive(pod: &Pod, node: &Node) -> Result<()> {
    node.ping(pod.v4()?.into(), 1)?;
    if let Ok(address) = pod.v6() {
        node.ping(address.into(), 1)?;
    }
    Ok(())
}

// ADD.

#[test]
fn an_add_that_fails_leaves_nothing() -> Result<()> {
    let node = Node::new()?;
    let plain = Network::new(&node, config(&node));
    let neighbour = plain.pod("neighbour")?;
    warm(&plain)?;
    node.install_script(
        "failing",
        "#!/bin/sh\n\
         echo $CNI_COMMAND >>/run/failing\n\
         [ $CNI_COMMAND = DEL ] && exit 0\n\
         echo '{\"cniVersion\":\"1.0.0\",\"code\":111,\"msg\":\"no luck\"}'\n\
         exit 1\n",
    )?;

    let with = |path: &[&str], value: Value| {
        let mut config = config(&node);
        let mut at = &mut config;
        for key in path {
            at = &mut at[*key];
        }
        *at = value;
        config
    };
    let mut exhausted = config(&node);
    exhausted["ipam"]["ranges"] = json!([
        [{"subnet": Network::V6_SUBNET}],
        [{"subnet": Network::V4_SUBNET, "rangeStart": neighbour.v4()?.to_string(),
          "rangeEnd": neighbour.v4()?.to_string()}],
    ]);
    let unreachable = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
    let other_gateway = json!([[{"subnet": "10.79.0.0/24"}]]);
    let failures: [(&str, Value, &[&str], &[&str]); 7] = [
        (
            "a route that cannot be",
            with(&["ipam", "routes"], unreachable),
            &[],
            &[],
        ),
        ("an exhausted pool", exhausted, &[], &[]),
        (
            "an address that is taken",
            with(&["args"], json!({"cni": {"ips": [neighbour.v4()?]}})),
            &[],
            &[],
        ),
        (
            "another gateway",
            with(&["ipam", "ranges"], other_gateway),
            &[],
            &[],
        ),
        (
            "an IPAM plugin that fails",
            with(&["ipam"], json!({"type": "failing"})),
            &[],
            &[],
        ),
        (
            "leases that cannot be written",
            config(&node),
            &["mount -o remount,ro /var/lib/cni"],
            &["mount -o remount,rw /var/lib/cni"],
        ),
        (
            "records that cannot be written",
            config(&node),
            &[
                "mount --bind /run/bpf-bridge /run/bpf-bridge",
                "mount -o remount,bind,ro /run/bpf-bridge",
            ],
            &["umount /run/bpf-bridge"],
        ),
    ];
    for (what, config, before, after) in failures {
        // Where it leaves records elsewhere, this is no failure for the plugin.
        if what.starts_with("records") && node.plugin() == "bridge" {
            continue;
        }
        let snapshot = Snapshot::take(&node)?;
        let sandbox = node.sandbox("pod")?;
        for command in before {
            node.run(command)?;
        }
        let network = Network::new(&node, config);
        let reply = call(&network, Verb::Add, &sandbox.attachment())?.run(&node)?;
        for command in after {
            node.run(command)?;
        }
        let error = reply.failure().context(what)?;
        ensure!(!error.msg.is_empty(), "{what}");
        ensure!(sandbox.device_names()? == ["lo"], "{what}");
        snapshot
            .ensure_same(&Snapshot::take(&node)?)
            .context(what)?;
        alive(&neighbour, &node).context(what)?;
        // Nothing stands in the way of the same pod's next attempt.
        let attachment = sandbox.attachment();
        plain.add(&attachment).context(what)?;
        plain.del(&attachment).context(what)?;
        snapshot
            .ensure_same(&Snapshot::take(&node)?)
            .context(what)?;
    }
    ensure!(
        node.read("/run/failing")?.lines().eq(["ADD", "DEL"]),
        "the delegate was not undone"
    );
    Ok(())
}

#[test]
fn the_first_add_of_a_node_leaves_nothing_if_it_fails() -> Result<()> {
    let node = Node::new()?;
    let before = Snapshot::take(&node)?;
    let mut config = config(&node);
    config["ipam"]["routes"] = json!([{"dst": "203.0.113.0/24", "gw": "192.0.2.1"}]);
    let network = Network::new(&node, config);
    ensure!(network.pod("pod").is_err());
    let after = Snapshot::take(&node)?;
    let left: Vec<String> = before
        .changes(&after)
        .into_iter()
        // Lock files stay, as others may be waiting on them.
        .filter(|change| !(change.starts_with("+file /") && change.split(' ').count() == 2))
        .collect();
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

#[test]
fn an_interface_that_exists_is_refused_and_left_alone() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = warm(&network)?;
    let sandbox = node.sandbox("pod")?;
    sandbox.ip("link add eth0 type bridge\naddr add 192.0.2.1/24 dev eth0")?;
    let error = call(&network, Verb::Add, &sandbox.attachment())?
        .run(&node)?
        .failure()?;
    ensure!(error.text().contains("eth0"), "{error:?}");
    before.ensure_same(&Snapshot::take(&node)?)?;
    // Nor does the DEL that follows a failed ADD take what is not ours.
    network.del(&sandbox.attachment())?;
    let eth0 = sandbox.device("eth0")?;
    ensure!(eth0["addr_info"][0]["local"] == "192.0.2.1", "{eth0}");
    Ok(())
}

#[test]
fn a_second_add_is_refused_and_the_first_goes_on_working() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    alive(&pod, &node)?;
    let before = Snapshot::take(&node)?;
    for _ in 0..2 {
        let error = call(&network, Verb::Add, pod.attachment())?
            .run(&node)?
            .failure()?;
        ensure!(error.text().contains("eth0"), "{error:?}");
        before.ensure_same(&Snapshot::take(&node)?)?;
        alive(&pod, &node)?;
        network.check(pod.attachment())?;
    }
    network.del(pod.attachment())?;
    Ok(())
}

#[test]
fn one_container_can_have_several_interfaces_and_networks() -> Result<()> {
    let node = Node::new()?;
    let one = Network::new(&node, config(&node));
    let mut other = config(&node);
    other["name"] = json!("other");
    other["bridge"] = json!("cni1");
    other["isDefaultGateway"] = json!(false);
    other["isGateway"] = json!(true);
    other["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}]]);
    let other = Network::new(&node, other);
    let mut second = config(&node);
    second["isDefaultGateway"] = json!(false);
    let second = Network::new(&node, second);

    let pod = one.pod("pod")?;
    let eth1 = pod.attachment().clone().ifname("eth1");
    let eth2 = pod.attachment().clone().ifname("eth2");
    let of_other = other.add(&eth1)?;
    let of_second = second.add(&eth2)?;
    ensure!(
        of_other["ips"][0]["address"] == "10.78.0.2/16",
        "{of_other}"
    );
    ensure!(
        of_second["ips"][0]["address"] == "10.77.0.3/16",
        "{of_second}"
    );
    node.ping("10.78.0.2".parse()?, 1)?;
    second.del(&eth2)?;
    other.del(&eth1)?;
    ensure!(pod.device_names()? == ["lo", "eth0"]);
    alive(&pod, &node)?;
    one.check(pod.attachment())
}

#[test]
fn sixty_pods_at_once_get_sixty_addresses_and_leave_nothing() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = warm(&network)?;
    // Once with the gateway there already, and once all for the first time.
    for fresh in [false, true] {
        let fresh_node = Node::new()?;
        let fresh_network = Network::new(&fresh_node, config(&fresh_node));
        let (node, network) = if fresh {
            (&fresh_node, &fresh_network)
        } else {
            (&node, &network)
        };
        let pods: Vec<Pod> = at_once(60, |number| network.pod(&format!("pod-{number}")))
            .into_iter()
            .collect::<Result<_>>()?;
        let addresses: BTreeSet<IpAddr> = pods.iter().flat_map(Pod::addresses).collect();
        ensure!(addresses.len() == 120, "{} addresses", addresses.len());
        for pod in &pods {
            network.check(pod.attachment())?;
        }
        // Everyone reaches the next.
        at_once(60, |number| {
            let next = &pods[(number + 1) % 60];
            pods[number].ping(next.v4()?.into(), 1)?;
            pods[number].ping(next.v6()?.into(), 1)
        })
        .into_iter()
        .collect::<Result<()>>()?;
        at_once(60, |number| network.del(pods[number].attachment()))
            .into_iter()
            .collect::<Result<()>>()?;
        let after = Snapshot::take(node)?;
        if fresh {
            // The same as is left by one.
            ensure!(after.matching("device veth").is_empty());
            ensure!(after.matching("networks/net/10.").is_empty());
        } else {
            before.ensure_same(&after)?;
        }
    }
    Ok(())
}

#[test]
fn calls_that_are_stopped_go_on() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let mut config = config(&node);
    config["ipMasq"] = json!(true);
    config["capabilities"] = json!({"portMappings": true});
    let network = Network::new(&node, config);
    // What is stopped is soon the verifier, which begins again with the program.
    stopped(&network, "first", &[Duration::from_millis(10); 8])?;
    for round in 0..3 {
        // Without a pod it takes the programs away.
        network.gc(&[])?;
        stopped(&network, &format!("load-{round}"), &moments(round))?;
    }
    let other = network.pod("other")?;
    for round in 3..30 {
        stopped(&network, &format!("pod-{round}"), &moments(round))?;
    }
    alive(&other, &node)?;
    let leases = node.run(&format!("ls {LEASES}"))?;
    let leases = leases.lines().filter(|name| name.starts_with("10."));
    ensure!(leases.count() == 1);
    Tables::read(&node)?.ensure_consistent()
}

/// Moments at which a call is stopped, each round others.
fn moments(round: u64) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(round);
    let mut moment = || Duration::from_micros(random.u64(0..1000));
    (0..200).map(|_| moment()).collect()
}

/// A pod's life, each call of which is stopped after each of these times.
fn stopped(network: &Network, id: &str, times: &[Duration]) -> Result<()> {
    let node = network.node();
    let mut stops = 0;
    let mut done = |call: Call| -> Result<Value> {
        loop {
            let (reply, more) = call.run_stopped(node, times)?;
            stops += more;
            // What aya asks of the kernel before it loads a program cannot be asked twice.
            let again = reply.failure().is_ok_and(|error| {
                error.code == 11 && error.text().contains("this process was stopped")
            });
            if !again {
                return reply.success().with_context(|| id.to_owned());
            }
        }
    };
    let sandbox = node.sandbox(id)?;
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let attachment = sandbox.attachment().capability("portMappings", ports);
    let result = done(call(network, Verb::Add, &attachment)?)?;
    let mut config = network.configs(Some(&attachment))?.remove(0);
    config["prevResult"] = result;
    done(network.call(&config, Verb::Check)?.attachment(&attachment))?;
    done(network.call(&config, Verb::Status)?)?;
    done(call(network, Verb::Del, &attachment)?)?;
    ensure!(stops > 0, "{id} was never stopped");
    Ok(())
}

// DEL.

#[test]
fn del_removes_everything_with_whatever_it_is_given() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = warm(&network)?;
    type Delete = fn(&Node, &Network, Pod) -> Result<Reply>;
    let ways: [(&str, Delete); 9] = [
        ("as it should be called", |node, network, pod| {
            let mut config = network.configs(None)?.remove(0);
            config["prevResult"] = pod.result().clone();
            network
                .call(&config, Verb::Del)?
                .attachment(pod.attachment())
                .run(node)
        }),
        ("without prevResult", |node, network, pod| {
            call(network, Verb::Del, pod.attachment())?.run(node)
        }),
        ("with an empty netns", |node, network, pod| {
            call(
                network,
                Verb::Del,
                &pod.attachment().clone().without_netns(),
            )?
            .run(node)
        }),
        ("without a netns variable", |node, network, pod| {
            call(network, Verb::Del, pod.attachment())?
                .env_remove("CNI_NETNS")
                .run(node)
        }),
        ("with a netns that is gone", |node, network, pod| {
            let attachment = pod.attachment().clone();
            drop(pod);
            call(network, Verb::Del, &attachment)?.run(node)
        }),
        (
            "with a netns path that is no netns",
            |node, network, pod| {
                let attachment = pod.attachment().clone();
                let path = pod.path().to_owned();
                drop(pod);
                node.within(|| Ok(std::fs::write(path, "")?))?;
                let reply = call(network, Verb::Del, &attachment)?.run(node);
                node.run(&format!("rm {}", attachment.netns))?;
                reply
            },
        ),
        ("with the host veth gone", |node, network, pod| {
            node.ip(&format!("link del {}", pod.host_veth()?))?;
            call(network, Verb::Del, pod.attachment())?.run(node)
        }),
        (
            "with the container's interface renamed",
            |node, network, pod| {
                pod.ip("link set eth0 down\nlink set eth0 name other0")?;
                let reply = call(
                    network,
                    Verb::Del,
                    &pod.attachment().clone().without_netns(),
                )?
                .run(node)?;
                if node.plugin() == "bridge" {
                    pod.ip("link del other0")?;
                }
                Ok(reply)
            },
        ),
        ("with the leases gone", |node, network, pod| {
            node.run(&format!("rm {LEASES}/{} {LEASES}/{}", pod.v4()?, pod.v6()?))?;
            call(network, Verb::Del, pod.attachment())?.run(node)
        }),
    ];
    for (what, delete) in ways {
        let pod = network.pod("pod")?;
        let attachment = pod.attachment().clone();
        let reply = delete(&node, &network, pod).context(what)?;
        ensure!(
            reply.success().context(what)?.is_null(),
            "{what}: {reply:?}"
        );
        // As containerd does.
        let again = call(&network, Verb::Del, &attachment.without_netns())?.run(&node)?;
        ensure!(
            again.success().context(what)?.is_null(),
            "{what}: {again:?}"
        );
        before.ensure_same(&Snapshot::take(&node)?).context(what)?;
    }
    Ok(())
}

#[test]
fn del_of_what_never_was_succeeds_and_changes_nothing() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let unknown = Attachment::new("unknown", "/run/netns/unknown", "eth0");
    // On a node without any of our state, too.
    network.del(&unknown)?;
    ensure!(!node.device_names()?.contains(&"cni0".to_owned()));
    let neighbour = network.pod("neighbour")?;
    let before = Snapshot::take(&node)?;
    network.del(&unknown)?;
    network.del(&neighbour.attachment().clone().ifname("eth1"))?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    alive(&neighbour, &node)
}

#[test]
fn del_takes_only_its_own_of_what_other_networks_have() -> Result<()> {
    let node = Node::new()?;
    let one = Network::new(&node, config(&node));
    let mut other = config(&node);
    other["name"] = json!("other");
    let other = Network::new(&node, other);
    let pod = one.pod("pod")?;
    let before = Snapshot::take(&node)?;
    // The same container and interface, in a network it is not in.
    other.del(&pod.attachment().clone().without_netns())?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    alive(&pod, &node)
}

#[test]
fn del_carries_on_when_the_ipam_plugin_fails() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "moody",
        "#!/bin/sh\n\
         case $CNI_COMMAND in\n\
         ADD) echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.77.0.9/16\"}]}';;\n\
         DEL) [ -e /run/moody ] || exit 0; echo '{\"code\":111,\"msg\":\"no luck\"}'; exit 1;;\n\
         esac\n",
    )?;
    let mut config = config(&node);
    config["ipam"] = json!({"type": "moody"});
    let network = Network::new(&node, config);
    let before = warm(&network)?;
    let pod = network.pod("pod")?;
    node.run("touch /run/moody")?;
    let error = call(&network, Verb::Del, pod.attachment())?
        .run(&node)?
        .failure()?;
    ensure!(error.text().contains("no luck"), "{error:?}");
    ensure!(
        pod.device_names()? == ["lo"],
        "the error of one kept the other"
    );
    node.run("rm /run/moody")?;
    network.del(pod.attachment())?;
    before.ensure_same(&Snapshot::take(&node)?)
}

#[test]
fn what_a_killed_add_leaves_is_cleaned_by_del_gc_or_the_next_add() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let neighbour = network.pod("neighbour")?;
    let before = warm(&network)?;
    let mut whole = Duration::MAX;
    for _ in 0..3 {
        let sandbox = node.sandbox("whole")?;
        let reply = call(&network, Verb::Add, &sandbox.attachment())?.run(&node)?;
        reply.success()?;
        whole = whole.min(reply.duration);
        network.del(&sandbox.attachment())?;
    }
    let steps = 24;
    let mut killed = 0;
    for step in 0..steps {
        let sandbox = node.sandbox("pod")?;
        let attachment = sandbox.attachment();
        let reply = call(&network, Verb::Add, &attachment)?
            .run_until_killed(&node, whole * step / steps)?;
        killed += u32::from(reply.status.code().is_none());
        let what = format!("killed in step {step} of {steps}");
        match step % 3 {
            0 => network.del(&attachment).context(what.clone())?,
            1 => network
                .gc(&[neighbour.attachment()])
                .context(what.clone())?,
            _ => {
                if reply.status.code().is_none() {
                    match network.add(&attachment) {
                        // It was killed when all was done and said.
                        Err(_) if serde_json::from_str::<Value>(&reply.stdout).is_ok() => {}
                        again => drop(again.context(what.clone())?),
                    }
                    node.ping(sandbox_v4(&sandbox)?, 1).context(what.clone())?;
                }
                network.del(&attachment).context(what.clone())?;
            }
        }
        ensure!(sandbox.device_names()? == ["lo"], "{what}");
        before.ensure_same(&Snapshot::take(&node)?).context(what)?;
    }
    ensure!(killed > steps / 3, "only {killed} of {steps} were killed");
    alive(&neighbour, &node)
}

fn sandbox_v4(sandbox: &bpf_bridge_tests::Sandbox) -> Result<IpAddr> {
    let eth0 = sandbox.device("eth0")?;
    Ok(eth0["addr_info"][0]["local"]
        .as_str()
        .context("no address")?
        .parse()?)
}

#[test]
fn a_killed_del_is_finished_by_the_next() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = warm(&network)?;
    let pod = network.pod("whole")?;
    let whole = call(&network, Verb::Del, pod.attachment())?.run(&node)?;
    whole.success()?;
    for step in 0..12 {
        let pod = network.pod("pod")?;
        call(&network, Verb::Del, pod.attachment())?
            .run_until_killed(&node, whole.duration * step / 12)?;
        network.del(pod.attachment())?;
        ensure!(pod.device_names()? == ["lo"]);
        before
            .ensure_same(&Snapshot::take(&node)?)
            .with_context(|| format!("killed in step {step}"))?;
    }
    Ok(())
}

// GC.

#[test]
fn gc_removes_what_is_not_valid_and_nothing_else() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let mut other = config(&node);
    other["name"] = json!("other");
    other["bridge"] = json!("cni1");
    other["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/16"}]]);
    let other = Network::new(&node, other);
    let bystander = other.pod("bystander")?;
    let before = warm(&network)?;
    let (valid, stale, gone) = (
        network.pod("valid")?,
        network.pod("stale")?,
        network.pod("gone")?,
    );
    let stale_too = valid.attachment().clone().ifname("eth1");
    let mut second = config(&node);
    second["isDefaultGateway"] = json!(false);
    Network::new(&node, second).add(&stale_too)?;
    drop(gone);
    // A lease that nothing else is known of, as a crash or another plugin leaves.
    node.run(&format!("cp {LEASES}/{} {LEASES}/10.77.44.44", stale.v4()?))?;

    network.gc(&[valid.attachment()])?;
    ensure!(stale.device_names()? == ["lo"]);
    ensure!(valid.device_names()? == ["lo", "eth0"]);
    alive(&valid, &node)?;
    alive(&bystander, &node)?;
    network.check(valid.attachment())?;
    network.del(valid.attachment())?;
    before.ensure_same(&Snapshot::take(&node)?)?;

    let _again = network.pod("again")?;
    network.gc(&[])?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    network.gc(&[])
}

// CHECK.

#[test]
fn check_finds_what_was_damaged_inside_the_container() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    for (what, script) in [
        ("eth0", "link del eth0"),
        ("eth0", "link set eth0 down"),
        ("10.77.", "addr flush dev eth0 scope global"),
        ("0.0.0.0/0", "route del default via 10.77.0.1"),
        ("::/0", "route del default via fd77::1"),
        ("eth0", "link set eth0 down\nlink set eth0 name other0"),
    ] {
        let pod = network.pod("pod")?;
        network.check(pod.attachment())?;
        pod.ip(script)?;
        let error = network
            .check(pod.attachment())
            .err()
            .with_context(|| format!("CHECK did not find {script:?}"))?;
        ensure!(format!("{error:#}").contains(what), "{script}: {error:#}");
        network.del(pod.attachment())?;
        if script.contains("other0") && node.plugin() == "bridge" {
            pod.ip("link del other0")?;
        }
    }
    Ok(())
}

#[test]
fn check_finds_what_was_damaged_on_the_host() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    let veth = pod.host_veth()?;
    let lease = format!("{LEASES}/{}", pod.v4()?);
    let lease_v6 = format!("{LEASES}/{}", pod.v6()?);
    let damages = [
        // A lease without its partner is still a lease; without both, none.
        (
            format!("mv {lease} {lease_v6} /run"),
            format!("mv /run/{} /run/{} {LEASES}", pod.v4()?, pod.v6()?),
        ),
        (
            "ip addr del 10.77.0.1/16 dev cni0".to_owned(),
            "ip addr add 10.77.0.1/16 dev cni0".to_owned(),
        ),
        (format!("tc qdisc del dev {veth} clsact"), String::new()),
    ];
    for (damage, repair) in damages {
        network.check(pod.attachment()).context(damage.clone())?;
        node.run(&damage)?;
        ensure!(
            network.check(pod.attachment()).is_err(),
            "CHECK did not find `{damage}`"
        );
        if !repair.is_empty() {
            node.run(&repair)?;
        }
    }
    network.del(pod.attachment())?;
    Ok(())
}

#[test]
fn check_finds_every_lost_map_entry() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    warm(&network)?;
    let entries = || -> Result<BTreeSet<(String, String)>> {
        let mut all = BTreeSet::new();
        for pin in node.run("find /sys/fs/bpf -type f")?.lines() {
            let Ok(map) = node.json(&format!("bpftool -j map show pinned {pin}")) else {
                continue;
            };
            if map["type"] != "hash" {
                continue;
            }
            let dump = node.json(&format!("bpftool -j map dump pinned {pin}"))?;
            for entry in dump.as_array().into_iter().flatten() {
                let words = |key: &str| -> String {
                    let bytes = entry[key].as_array().into_iter().flatten();
                    let words: Vec<&str> = bytes.filter_map(Value::as_str).collect();
                    words.join(" ")
                };
                // The value of a map with one per CPU cannot be written back so.
                all.insert((
                    pin.to_owned(),
                    format!("{}|{}", words("key"), words("value")),
                ));
            }
        }
        Ok(all)
    };
    let before: BTreeSet<_> = entries()?;
    let pod = network.pod("pod")?;
    let added: Vec<_> = entries()?.difference(&before).cloned().collect();
    ensure!(added.len() >= 4, "a port, a MAC, two addresses: {added:?}");
    for (pin, entry) in added {
        let (key, value) = entry.split_once('|').context("no value")?;
        network.check(pod.attachment())?;
        node.run(&format!(
            "bpftool map delete pinned {pin} key hex {}",
            key.replace("0x", "")
        ))?;
        ensure!(
            network.check(pod.attachment()).is_err(),
            "CHECK did not find that {pin} lost {key}"
        );
        node.run(&format!(
            "bpftool map update pinned {pin} key hex {} value hex {}",
            key.replace("0x", ""),
            value.replace("0x", "")
        ))?;
    }
    network.check(pod.attachment())
}

#[test]
fn check_tolerates_what_plugins_later_in_the_chain_change() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    pod.ip("link set eth0 mtu 1300\n\
         link set eth0 address 02:00:00:00:00:42\n\
         addr add 192.0.2.9/24 dev eth0\n\
         route add 203.0.113.0/24 via 10.77.0.1")?;
    network.check(pod.attachment())
}

// STATUS.

fn status(network: &Network) -> Result<Reply> {
    network.status()?.pop().context("no plugin")
}

/// That STATUS fails with this code, and says what is wrong with a word of it.
fn is_unwell(network: &Network, code: u64, words: &[&str]) -> Result<()> {
    let error = status(network)?.failure()?;
    ensure!(error.code == code, "{error:?}");
    for word in words {
        ensure!(error.text().contains(word), "{word:?} in {error:?}");
    }
    Ok(())
}

#[test]
fn status_is_well_before_and_after_the_first_pod() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = Snapshot::take(&node)?;
    ensure!(status(&network)?.success()?.is_null());
    ensure!(
        before
            .changes(&Snapshot::take(&node)?)
            .iter()
            .all(|change| change.contains("lock"))
    );
    let pod = network.pod("pod")?;
    ensure!(status(&network)?.success()?.is_null());
    network.del(pod.attachment())?;
    ensure!(status(&network)?.success()?.is_null());
    Ok(())
}

#[test]
fn status_is_50_without_bpffs() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    node.run("umount /sys/fs/bpf")?;
    is_unwell(&network, 50, &["/sys/fs/bpf"])?;
    // And an ADD indeed fails, for the same reason.
    let error = network.pod("pod").err().context("ADD succeeded")?;
    ensure!(format!("{error:#}").contains("/sys/fs/bpf"), "{error:#}");
    Ok(())
}

#[test]
fn status_is_50_when_the_pool_is_exhausted() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, small(&node, 2));
    let _first = network.pod("first")?;
    ensure!(status(&network)?.success()?.is_null());
    let second = network.pod("second")?;
    is_unwell(&network, 50, &["10.77.0.10"])?;
    ensure!(network.pod("third").is_err());
    network.del(second.attachment())?;
    ensure!(status(&network)?.success()?.is_null());
    Ok(())
}

#[test]
fn status_is_51_when_a_pods_program_is_detached() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    let veth = pod.host_veth()?.to_owned();
    node.run(&format!("tc qdisc del dev {veth} clsact"))?;
    is_unwell(&network, 51, &[&veth])?;
    network.del(pod.attachment())?;
    ensure!(status(&network)?.success()?.is_null());
    Ok(())
}

#[test]
fn status_is_51_when_the_gateway_port_or_device_is_damaged() -> Result<()> {
    for damage in ["qdisc", "device"] {
        let node = Node::new()?;
        let network = Network::new(&node, config(&node));
        let _pod = network.pod("pod")?;
        match damage {
            "qdisc" => {
                let peer = node.device("cni0")?["link"]
                    .as_str()
                    .context("no peer")?
                    .to_owned();
                node.run(&format!("tc qdisc del dev {peer} clsact"))?;
            }
            _ => node.ip("link del cni0")?,
        }
        is_unwell(&network, 51, &["cni0"]).context(damage)?;
    }
    Ok(())
}

#[test]
fn status_is_51_when_the_pins_are_gone_while_pods_live() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    node.run("rm -r /sys/fs/bpf/bpf-bridge")?;
    is_unwell(&network, 51, &["/sys/fs/bpf"])?;
    network.del(pod.attachment())?;
    Ok(())
}

// Leases.

/// Calls a stock plugin for an attachment, with our network's configuration.
fn stock(node: &Node, plugin: &str, verb: Verb, config: &Value, id: &str) -> Result<Value> {
    let mut config = config.clone();
    config["cniVersion"] = json!("1.0.0");
    config["type"] = json!(plugin);
    Call::new(plugin, verb)
        .attachment(&Attachment::new(id, "/run/netns/unused", "eth0"))
        .stdin(config)
        .run(node)?
        .success()
}

#[test]
fn leases_are_shared_with_the_stock_plugin_both_ways() -> Result<()> {
    let node = Node::new()?;
    let config = config(&node);
    let network = Network::new(&node, config.clone());
    let theirs = stock(&node, "host-local", Verb::Add, &config, "stock-1")?;
    ensure!(theirs["ips"][0]["address"] == "10.77.0.2/16", "{theirs}");
    let ours = network.pod("ours")?;
    ensure!(
        ours.v4()? == Ipv4Addr::new(10, 77, 0, 3),
        "{}",
        ours.result()
    );
    let theirs = stock(&node, "host-local", Verb::Add, &config, "stock-2")?;
    ensure!(theirs["ips"][0]["address"] == "10.77.0.4/16", "{theirs}");
    ensure!(theirs["ips"][1]["address"] == "fd77::4/64", "{theirs}");

    // Each finds the other's lease in order, and may give it back.
    let lease = node.within(|| Ok(std::fs::read_to_string(format!("{LEASES}/10.77.0.3"))?))?;
    ensure!(lease == "ours\r\neth0", "{lease:?}");
    stock(&node, "host-local", Verb::Check, &config, "ours")?;
    stock(&node, "host-local", Verb::Del, &config, "ours")?;
    ensure!(
        node.run(&format!("ls {LEASES}"))?
            .lines()
            .all(|name| name != "10.77.0.3")
    );
    network.del(&Attachment::new("stock-1", "", "eth0"))?;
    network.del(&Attachment::new("stock-2", "", "eth0"))?;
    network.del(ours.attachment())?;
    let left = Snapshot::take(&node)?.matching(LEASES);
    ensure!(
        left.iter()
            .all(|file| file.contains("lock") || file.contains("last_reserved")),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn a_node_can_change_from_the_stock_chain_and_back_without_losing_a_reservation() -> Result<()> {
    let node = Node::new()?;
    let config = config(&node);
    let mut stocks = config.clone();
    stocks["cniVersion"] = json!("1.0.0");
    stocks["type"] = json!("bridge");
    stocks["bridge"] = json!("linux0");
    stocks["isDefaultGateway"] = json!(false);
    let stocks = Network::new(&node, stocks);
    let ours = Network::new(&node, config);
    let mut seen = BTreeSet::new();
    let mut pods = Vec::new();
    for (number, network) in [&stocks, &ours, &stocks, &ours].into_iter().enumerate() {
        let pod = network.pod(&format!("pod-{number}"))?;
        for address in pod.addresses() {
            ensure!(seen.insert(address), "{address} was given twice");
        }
        pods.push(pod);
    }
    // A pod of the stock chain is deleted by ours, and the other way round.
    ours.del(pods[0].attachment())?;
    stocks.del(pods[1].attachment())?;
    let leases = node.run(&format!("ls {LEASES}"))?;
    for (pod, there) in pods.iter().zip([false, false, true, true]) {
        let address = pod.v4()?.to_string();
        ensure!(
            leases.lines().any(|lease| lease == address) == there,
            "{address}: {leases}"
        );
    }
    Ok(())
}

/// Lets a pod's sandbox go without a DEL, and waits until the kernel, which takes
/// its time, has taken the devices away.
fn bury(node: &Node, pod: Pod) -> Result<()> {
    let host_veth = pod.host_veth()?.to_owned();
    drop(pod);
    wait_for("the end of the sandbox", Duration::from_secs(5), || {
        Ok(!node.device_names()?.contains(&host_veth))
    })
}

#[test]
fn leases_of_the_dead_are_taken_back_and_those_of_the_living_are_not() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, small(&node, 4));
    let alive_one = network.pod("alive")?;
    // Its sandbox goes without a DEL.
    bury(&node, network.pod("dead")?)?;
    // As a crash of the stock plugin leaves it, and as the stock plugin leaves it
    // for a pod that may well live.
    node.within(|| {
        let lease = |last: u8| format!("{LEASES}/10.77.0.{last}");
        std::fs::write(lease(12), "")?;
        std::fs::write(lease(13), "of-stock\r\neth0")?;
        Ok(())
    })?;
    ensure!(status(&network)?.success()?.is_null());
    let pods: Vec<Pod> = ["first", "second"]
        .into_iter()
        .map(|name| network.pod(name))
        .collect::<Result<_>>()?;
    let given: BTreeSet<u8> = pods
        .iter()
        .map(|pod| Ok(pod.v4()?.octets()[3]))
        .collect::<Result<_>>()?;
    ensure!(given == [11, 12].into(), "{given:?}");
    match network.pod("too-many") {
        Ok(pod) => bail!("took {} from the living", pod.v4()?),
        Err(error) => ensure!(format!("{error:#}").contains("10.77.0.10"), "{error:#}"),
    }
    for pod in pods.iter().chain([&alive_one]) {
        alive(pod, &node)?;
    }
    Ok(())
}

#[test]
fn the_first_add_after_a_reboot_frees_what_was_leased_before_it() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, small(&node, 4));
    bury(&node, network.pod("before")?)?;
    let lease = format!("{LEASES}/10.77.0.10");
    ensure!(node.within(|| Ok(std::fs::exists(&lease)?))?);
    // All that a reboot changes for the plugin: another id of the boot, and
    // nothing in memory file systems.
    let boot_id = "/run/bpf-bridge/boot_id";
    node.within(|| {
        Ok(std::fs::write(
            boot_id,
            "8a4e2c3f-0000-4000-8000-000000000000\n",
        )?)
    })?;
    for command in [
        &format!("mount --bind {boot_id} /proc/sys/kernel/random/boot_id"),
        "rm -r /run/bpf-bridge/attachments /sys/fs/bpf/bpf-bridge",
        "ip link delete cni0",
    ] {
        node.run(command)?;
    }
    let after = network.pod("after")?;
    alive(&after, &node)?;
    ensure!(
        !node.within(|| Ok(std::fs::exists(&lease)?))?,
        "still leased: {lease}"
    );
    Ok(())
}

#[test]
fn addresses_go_round_before_they_come_again() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, small(&node, 4));
    let mut given = Vec::new();
    for _ in 0..6 {
        let pod = network.pod("pod")?;
        given.push(pod.v4()?.octets()[3]);
        network.del(pod.attachment())?;
    }
    ensure!(given == [10, 11, 12, 13, 10, 11], "{given:?}");
    Ok(())
}

// Living on.

#[test]
fn connections_outlive_the_coming_and_going_of_neighbours() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    let server = EchoServer::start(&b, b.v4()?.into())?;
    thread::scope(|scope| -> Result<()> {
        let transfer = scope.spawn(|| a.tcp_transfer(server.address(), 60_000_000));
        for number in 0..5 {
            let pod = network.pod(&format!("neighbour-{number}"))?;
            alive(&pod, &node)?;
            network.del(pod.attachment())?;
        }
        transfer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(())
    })?;
    a.udp_echo(server.address(), b"still there", Duration::from_secs(1))?;
    Ok(())
}

// Crashes that a kill hits too seldom to be tried by killing.

fn clear_alias(node: &Node, device: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    let output = node.output(ip.args(["link", "set", "dev", device, "alias", ""]))?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn a_gateway_whose_making_was_killed_is_made_anew() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let before = warm(&network)?;
    // The alias comes last.
    clear_alias(&node, "cni0")?;
    let pod = network.pod("pod")?;
    alive(&pod, &node)?;
    network.check(pod.attachment())?;
    // One that pods have joined is whole, whatever its alias says.
    clear_alias(&node, "cni0")?;
    let other = network.pod("other")?;
    for pod in [&pod, &other] {
        alive(pod, &node)?;
    }
    for pod in [&pod, &other] {
        network.del(pod.attachment())?;
    }
    // Of the first gateway nothing is left: as many entries, one device. But of its
    // addresses, which one that was killed at this point would not have had.
    let after = Snapshot::take(&node)?;
    let count = |snapshot: &Snapshot| -> Vec<String> {
        let pins = snapshot.matching("pin ");
        pins.iter()
            .filter(|pin| !pin.contains("NEIGHBORS"))
            .filter_map(|pin| Some(pin.split_once(" keys: ")?.0.to_owned()))
            .collect()
    };
    ensure!(
        count(&before) == count(&after),
        "{before:?}\nthen {after:?}"
    );
    Ok(())
}

#[test]
fn del_works_when_the_load_of_the_programs_was_killed() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    for pin in node.run("find /sys/fs/bpf/bpf-bridge -type f")?.lines() {
        if !pin.ends_with("/PORTS") {
            node.run(&format!("rm {pin}"))?;
        }
    }
    network.del(pod.attachment())?;
    ensure!(pod.device_names()? == ["lo"]);
    Ok(())
}

#[test]
fn a_del_that_waits_for_its_bridge_stands_in_nobodys_way() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, config(&node));
    let pod = network.pod("pod")?;
    // An ADD holds the lock of the bridge, and may then want the pins alone.
    node.install_script(
        "hold",
        "#!/bin/sh\n\
         exec 9>/run/bpf-bridge/bridges/cni0\n\
         flock 9\n\
         : >/run/held\n\
         until [ -e /run/waits ]; do sleep 0.05; done\n\
         sleep 0.3\n\
         flock -w 5 /run/bpf-bridge/datapath.lock true && : >/run/had\n",
    )?;
    thread::scope(|scope| -> Result<()> {
        let held = scope.spawn(|| node.run(&format!("{}/hold", Node::CNI_PATH)));
        wait_for("lock", Duration::from_secs(5), || {
            Ok(node.run("test -e /run/held").is_ok())
        })?;
        node.run("touch /run/waits")?;
        network.del(pod.attachment())?;
        held.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        Ok(())
    })?;
    node.run("test -e /run/had")?;
    Ok(())
}

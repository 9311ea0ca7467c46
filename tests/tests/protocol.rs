//! The protocol, as a runtime sees it: variables, standard input, results and
//! errors of every version of the specification, and the options of the
//! configuration.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Call, CniError, MacAddr, Namespace, Network, Node, Pod, Reply, Sandbox, Snapshot, Verb,
};
use serde_json::{Value, json};

/// Every version of the specification.
const VERSIONS: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];

/// The configuration of [`Network::dual_stack`] with keys of a JSON object
/// added, replaced, or removed where the value is null.
fn dual_stack_with(node: &Node, changes: Value) -> Value {
    let mut config = Network::dual_stack(node);
    for (key, value) in changes.as_object().into_iter().flatten() {
        if value.is_null() {
            config.as_object_mut().and_then(|config| config.remove(key));
        } else {
            config[key] = value.clone();
        }
    }
    config
}

fn call(node: &Node, verb: Verb, sandbox: &Sandbox, config: impl ToString) -> Result<Reply> {
    Call::new(node.plugin(), verb)
        .attachment(&sandbox.attachment())
        .stdin(config)
        .run(node)
}

/// ADDs a configuration that must be refused, and leave the sandbox alone.
fn refused(node: &Node, config: impl ToString) -> Result<CniError> {
    let config = config.to_string();
    let sandbox = node.sandbox("refused")?;
    let error = call(node, Verb::Add, &sandbox, &config)?
        .failure()
        .with_context(|| config.clone())?;
    let devices = sandbox.device_names()?;
    ensure!(devices == ["lo"], "{config} left {devices:?}");
    Ok(error)
}

/// ADDs a configuration that must be accepted.
fn attached(node: &Node, name: &str, config: Value) -> Result<Pod> {
    let text = config.to_string();
    Network::new(node, config).pod(name).with_context(|| text)
}

fn strings(value: &Value) -> Vec<&str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

fn interface<'a>(result: &'a Value, name: &str) -> Result<&'a Value> {
    result["interfaces"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|interface| interface["name"] == name)
        .with_context(|| format!("no interface {name} in {result}"))
}

// The verbs that change nothing.

#[test]
fn version_lists_all_seven_versions_whatever_the_variables_hold() -> Result<()> {
    let node = Node::new()?;
    for stdin in [r#"{"cniVersion":"1.1.0"}"#, r#"{"cniVersion":"0.3.1"}"#, ""] {
        let mut call = Call::new(node.plugin(), Verb::Version).stdin(stdin);
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"] {
            call = call.env(variable, "dummy");
        }
        let answer = call.run(&node)?.success()?;
        ensure!(
            strings(&answer["supportedVersions"]) == VERSIONS,
            "{answer}"
        );
        ensure!(answer["cniVersion"].is_string(), "{answer}");
        let bare = Call::new(node.plugin(), Verb::Version)
            .env_remove("CNI_PATH")
            .stdin(stdin)
            .run(&node)?;
        ensure!(bare.success()? == answer);
    }
    Ok(())
}

#[test]
fn without_a_command_the_banner_goes_to_stderr_and_nothing_fails() -> Result<()> {
    let node = Node::new()?;
    let reply = Call::new(node.plugin(), Verb::Add)
        .env_remove("CNI_COMMAND")
        .env_remove("CNI_PATH")
        .run(&node)?;
    ensure!(reply.success()?.is_null(), "{reply:?}");
    let first = reply.stderr.lines().next().unwrap_or_default();
    // nerdctl reads the version out of a line of this form.
    ensure!(
        first.starts_with("CNI ") && first.contains(" plugin "),
        "{first}"
    );
    for version in VERSIONS {
        ensure!(reply.stderr.contains(version), "{}", reply.stderr);
    }
    Ok(())
}

// Variables.

#[test]
fn a_missing_variable_is_error_4_and_named() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let needed = [
        (
            Verb::Add,
            &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..],
        ),
        (Verb::Check, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        (Verb::Del, &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ];
    for (verb, variables) in needed {
        let whole = Call::new(node.plugin(), verb)
            .attachment(&sandbox.attachment())
            .stdin(Network::dual_stack(&node));
        let mut none = whole.clone();
        for variable in variables {
            none = none.env_remove(variable);
            for call in [
                whole.clone().env_remove(variable),
                whole.clone().env(variable, ""),
            ] {
                let error = call.run(&node)?.failure()?;
                ensure!(
                    error.code == 4 && error.msg.contains(variable),
                    "{verb:?} without {variable}: {error:?}"
                );
            }
        }
        let error = none.run(&node)?.failure()?;
        for variable in variables {
            ensure!(error.msg.contains(variable), "{error:?}");
        }
    }
    Ok(())
}

#[test]
fn a_bad_variable_is_error_4_and_its_value_named() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let bad = [
        ("CNI_COMMAND", &["FOO", "add"][..]),
        (
            "CNI_CONTAINERID",
            &["-x", ".x", "a/b", "a b", "a;b", "../a"],
        ),
        (
            "CNI_IFNAME",
            &[".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-ab"],
        ),
    ];
    for (variable, values) in bad {
        for value in values {
            let error = Call::new(node.plugin(), Verb::Add)
                .attachment(&sandbox.attachment())
                .env(variable, value)
                .stdin(Network::dual_stack(&node))
                .run(&node)?
                .failure()
                .with_context(|| format!("{variable}={value}"))?;
            ensure!(error.code == 4, "{variable}={value}: {error:?}");
        }
    }
    ensure!(sandbox.device_names()? == ["lo"]);
    Ok(())
}

#[test]
fn the_longest_interface_name_is_allowed() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment().ifname("fifteen-bytes.a");
    let network = Network::new(&node, Network::dual_stack(&node));
    network.add(&attachment)?;
    sandbox.device("fifteen-bytes.a")?;
    network.del(&attachment)?;
    ensure!(sandbox.device_names()? == ["lo"]);
    Ok(())
}

#[test]
fn a_netns_that_is_none_or_the_plugins_own_is_error_8() -> Result<()> {
    let node = Node::new()?;
    node.run("touch /run/regular-file")?;
    let before = node.device_names()?;
    for netns in [
        "/proc/self/ns/net",
        "/proc/self/ns/mnt",
        "/run/regular-file",
        "/run",
        "/run/not-there",
    ] {
        let error = Call::new(node.plugin(), Verb::Add)
            .env("CNI_CONTAINERID", "pod")
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .stdin(Network::dual_stack(&node))
            .run(&node)?
            .failure()
            .with_context(|| netns)?;
        ensure!(error.code == 8 && error.text().contains(netns), "{error:?}");
    }
    ensure!(node.device_names()? == before, "{:?}", node.device_names()?);
    Ok(())
}

#[test]
fn cni_args_are_checked_unless_unknown_ones_are_to_be_ignored() -> Result<()> {
    let node = Node::new()?;
    let network = Network::new(&node, Network::dual_stack(&node));
    let sandbox = node.sandbox("pod")?;
    let unknown = "K8S_POD_NAME=web;K8S_POD_NAMESPACE=default";
    let error = Call::new(node.plugin(), Verb::Add)
        .attachment(&sandbox.attachment().args(unknown))
        .stdin(Network::dual_stack(&node))
        .run(&node)?
        .failure()?;
    ensure!(error.text().contains("K8S_POD_NAME"), "{error:?}");
    for args in [
        format!("IgnoreUnknown=1;{unknown}"),
        format!("{unknown};IgnoreUnknown=true"),
    ] {
        let attachment = sandbox.attachment().args(&args);
        network.add(&attachment)?;
        network.del(&attachment)?;
    }
    Ok(())
}

// Standard input.

#[test]
fn what_is_no_configuration_is_error_6() -> Result<()> {
    let node = Node::new()?;
    let cut = Network::dual_stack(&node).to_string();
    for stdin in [
        "",
        "{",
        "[]",
        "null and void",
        "\u{0}",
        &cut[..cut.len() - 1],
    ] {
        let error = refused(&node, stdin)?;
        ensure!(error.code == 6, "{stdin:?}: {error:?}");
    }
    Ok(())
}

#[test]
fn a_value_of_the_wrong_type_is_refused_and_its_key_named() -> Result<()> {
    let node = Node::new()?;
    for (key, value) in [
        ("bridge", json!(5)),
        ("isGateway", json!("yes")),
        ("mtu", json!("1500")),
        ("mtu", json!(1500.5)),
        ("ipam", json!([])),
        ("name", json!(5)),
    ] {
        let error = refused(&node, dual_stack_with(&node, json!({key: value})))?;
        // It cannot be decoded, or it is invalid: both can be said.
        ensure!([6, 7].contains(&error.code), "{key}: {error:?}");
        ensure!(error.text().contains(key), "{key}: {error:?}");
    }
    Ok(())
}

#[test]
fn a_missing_or_bad_name_is_error_7() -> Result<()> {
    let node = Node::new()?;
    for name in [
        json!(null),
        json!(""),
        json!("-net"),
        json!("a/b"),
        json!(".."),
    ] {
        let error = refused(&node, dual_stack_with(&node, json!({"name": name})))?;
        ensure!(error.code == 7, "{name}: {error:?}");
        ensure!(error.text().contains("name"), "{error:?}");
    }
    Ok(())
}

#[test]
fn a_version_that_is_not_supported_is_error_1_and_named() -> Result<()> {
    let node = Node::new()?;
    for version in ["9.9.9", "1.2.0", "0.5.0", "v1.0.0", "1.0"] {
        let error = refused(
            &node,
            dual_stack_with(&node, json!({"cniVersion": version})),
        )?;
        ensure!(
            error.code == 1 && error.text().contains(version),
            "{error:?}"
        );
    }
    Ok(())
}

#[test]
fn verbs_newer_than_the_configuration_are_error_1() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    for (verb, version) in [
        (Verb::Check, "0.3.1"),
        (Verb::Gc, "1.0.0"),
        (Verb::Status, "1.0.0"),
    ] {
        let mut config = dual_stack_with(&node, json!({"cniVersion": version}));
        config["cni.dev/valid-attachments"] = json!([]);
        let error = call(&node, verb, &sandbox, config)?.failure()?;
        ensure!(error.code == 1, "{verb:?} of {version}: {error:?}");
    }
    Ok(())
}

#[test]
fn unknown_keys_are_tolerated_at_every_level() -> Result<()> {
    let node = Node::new()?;
    let mut config = dual_stack_with(
        &node,
        json!({
            "x-unknown": {"a": [1, null]},
            "cni.dev/unknown": true,
            "capabilities": {"portMappings": true, "unheardOf": false},
            "runtimeConfig": {"unheardOf": {}, "aliases": {"net": ["web"]}},
            "args": {"unheardOf": 1, "cni": {"unheardOf": 2}},
        }),
    );
    config["ipam"]["x-unknown"] = json!(1);
    config["ipam"]["ranges"][0][0]["x-unknown"] = json!("a");
    let pod = attached(&node, "pod", config)?;
    pod.v4()?;
    Ok(())
}

#[test]
fn keys_match_in_any_case_as_in_go() -> Result<()> {
    let node = Node::new()?;
    let config = json!({
        "CNIVersion": "1.0.0",
        "Name": "net",
        "Type": node.plugin(),
        "BRIDGE": "br0",
        "IsDefaultGateway": true,
        "Mtu": 1400,
        "RuntimeConfig": {"MAC": "02:00:00:00:00:07"},
        "IPAM": {
            "Type": "host-local",
            "RANGES": [[{"SubNet": "10.78.0.0/24", "RangeStart": "10.78.0.50"}]],
        },
    });
    let sandbox = node.sandbox("pod")?;
    let result = call(&node, Verb::Add, &sandbox, config)?.success()?;
    ensure!(result["ips"][0]["address"] == "10.78.0.50/24", "{result}");
    ensure!(
        interface(&result, "eth0")?["mac"] == "02:00:00:00:00:07",
        "{result}"
    );
    let eth0 = sandbox.device("eth0")?;
    ensure!(eth0["mtu"] == 1400, "{eth0}");
    node.device("br0")?;
    Ok(())
}

#[test]
fn capital_keys_of_containerd_are_understood() -> Result<()> {
    let node = Node::new()?;
    // As logged from containerd 1.6 and 2.1.
    let config = dual_stack_with(
        &node,
        json!({
            "capabilities": {"portMappings": true, "bandwidth": true, "dns": true},
            "runtimeConfig": {
                "portMappings": [],
                "dns": {"Servers": [], "Searches": [], "Options": []},
                "io.kubernetes.cri.pod-annotations": {"a": "b"},
            },
        }),
    );
    attached(&node, "pod", config)?;
    Ok(())
}

#[test]
fn errors_are_json_on_stdout_in_the_configurations_version() -> Result<()> {
    let node = Node::new()?;
    for version in ["0.4.0", "1.0.0"] {
        let config = dual_stack_with(&node, json!({"cniVersion": version, "name": "-"}));
        let error = refused(&node, config)?;
        ensure!(error.cni_version == version, "{error:?}");
        ensure!(
            !error.msg.is_empty() && !error.msg.contains('\n'),
            "{error:?}"
        );
    }
    Ok(())
}

// Results.

#[test]
fn every_version_can_add_check_and_delete() -> Result<()> {
    let node = Node::new()?;
    let mut warm = None;
    for version in VERSIONS {
        let network = Network::new(
            &node,
            dual_stack_with(&node, json!({"cniVersion": version})),
        );
        let sandbox = node.sandbox("pod")?;
        let attachment = sandbox.attachment();
        let result = network.add(&attachment).with_context(|| version)?;
        ensure!(result["cniVersion"] == version, "{result}");
        let (v4, v6) = if version < "0.3.0" {
            for key in ["ips", "interfaces", "routes"] {
                ensure!(result.get(key).is_none(), "{key} in {result}");
            }
            ensure!(result["ip4"]["gateway"] == "10.77.0.1", "{result}");
            ensure!(result["ip6"]["gateway"] == "fd77::1", "{result}");
            ensure!(result["ip4"]["routes"][0]["dst"] == "0.0.0.0/0", "{result}");
            ensure!(result["ip6"]["routes"][0]["dst"] == "::/0", "{result}");
            (&result["ip4"]["ip"], &result["ip6"]["ip"])
        } else {
            let ips = &result["ips"];
            ensure!(ips.as_array().is_some_and(|ips| ips.len() == 2), "{result}");
            for (index, family) in [(0, "4"), (1, "6")] {
                let expected = if version < "1.0.0" {
                    json!(family)
                } else {
                    Value::Null
                };
                ensure!(ips[index]["version"] == expected, "{result}");
                ensure!(ips[index]["interface"] == 2, "{result}");
            }
            ensure!(ips[0]["gateway"] == "10.77.0.1", "{result}");
            ensure!(ips[1]["gateway"] == "fd77::1", "{result}");
            let destinations: Vec<_> = result["routes"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|route| (route["dst"].as_str(), route["gw"].as_str()))
                .collect();
            ensure!(
                destinations
                    == [
                        (Some("0.0.0.0/0"), Some("10.77.0.1")),
                        (Some("::/0"), Some("fd77::1"))
                    ],
                "{result}"
            );
            (&ips[0]["address"], &ips[1]["address"])
        };
        let held = sandbox.run("ip -o addr show dev eth0")?;
        for address in [v4, v6] {
            let address = address.as_str().with_context(|| result.to_string())?;
            ensure!(held.contains(address), "{address} in {held}");
        }
        if version >= "0.4.0" {
            network.check(&attachment).with_context(|| version)?;
        }
        network.del(&attachment).with_context(|| version)?;
        ensure!(sandbox.device_names()? == ["lo"], "{version}");
        // What the first leaves is the network's and not the pod's.
        let after = Snapshot::take(&node)?;
        warm.get_or_insert_with(|| after.clone())
            .ensure_same(&after)
            .with_context(|| version)?;
    }
    Ok(())
}

#[test]
fn an_empty_version_is_0_1_0() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let config = dual_stack_with(&node, json!({"cniVersion": null}));
    let result = call(&node, Verb::Add, &sandbox, config)?.success()?;
    ensure!(result["ip4"]["ip"].is_string(), "{result}");
    ensure!(
        ["0.1.0", ""].contains(&result["cniVersion"].as_str().unwrap_or("")),
        "{result}"
    );
    Ok(())
}

#[test]
fn the_result_names_gateway_device_host_veth_and_container_interface() -> Result<()> {
    let node = Node::new()?;
    let pod = attached(&node, "pod", Network::dual_stack(&node))?;
    let interfaces = pod.result()["interfaces"]
        .as_array()
        .context("no interfaces")?
        .clone();
    ensure!(interfaces.len() == 3, "{interfaces:?}");
    ensure!(interfaces[0]["name"] == "cni0");
    ensure!(interfaces[2]["name"] == "eth0");
    let (host, inside): (&Namespace, &Namespace) = (&node, &pod);
    for (index, namespace) in [(0, host), (1, host), (2, inside)] {
        let name = interfaces[index]["name"].as_str().context("no name")?;
        let device = namespace.device(name)?;
        ensure!(interfaces[index]["mac"] == device["address"], "{device}");
        let up = device["flags"]
            .as_array()
            .is_some_and(|flags| flags.contains(&json!("UP")));
        ensure!(up, "{device}");
    }
    for index in [0, 1] {
        ensure!(
            interfaces[index]
                .get("sandbox")
                .is_none_or(|path| path == "")
        );
    }
    ensure!(interfaces[2]["sandbox"] == *pod.path().to_string_lossy());
    Ok(())
}

#[test]
fn a_result_of_1_1_has_the_interfaces_mtu() -> Result<()> {
    let node = Node::new()?;
    let config = dual_stack_with(&node, json!({"cniVersion": "1.1.0", "mtu": 1400}));
    let pod = attached(&node, "pod", config)?;
    ensure!(
        interface(pod.result(), "eth0")?["mtu"] == 1400,
        "{}",
        pod.result()
    );
    // From 1.1 to 1.0 nothing is taken out (as libcni has it).
    let config = dual_stack_with(&node, json!({"cniVersion": "0.4.0", "mtu": 1400}));
    let pod = attached(&node, "old", config)?;
    ensure!(
        interface(pod.result(), "eth0")?.get("mtu").is_none(),
        "{}",
        pod.result()
    );
    Ok(())
}

#[test]
fn routes_have_all_that_1_1_lets_them_have() -> Result<()> {
    let node = Node::new()?;
    let route = json!({
        "dst": "203.0.113.0/24", "gw": "10.77.0.9",
        "mtu": 1300, "advmss": 1200, "priority": 50, "table": 100, "scope": 0,
    });
    let linked = json!({"dst": "192.0.2.0/24", "gw": "10.77.0.8"});
    let mut config = dual_stack_with(&node, json!({"cniVersion": "1.1.0"}));
    let on_link = json!({"dst": "198.18.0.0/15", "scope": 253});
    config["ipam"]["routes"] = json!([route, linked, on_link]);
    let pod = attached(&node, "pod", config)?;
    let routes = pod.result()["routes"].as_array().context("no routes")?;
    ensure!(
        routes.contains(&route) && routes.contains(&linked),
        "{routes:?}"
    );
    let shown = pod.run("ip route show table 100")?;
    for part in [
        "203.0.113.0/24 via 10.77.0.9",
        "metric 50",
        "mtu 1300",
        "advmss 1200",
    ] {
        ensure!(shown.contains(part), "{part} in {shown}");
    }
    let shown = pod.run("ip route")?;
    ensure!(shown.contains("192.0.2.0/24 via 10.77.0.8"), "{shown}");
    // No next hop: who is there is on the link.
    let shown = pod.run("ip route show 198.18.0.0/15")?;
    ensure!(
        shown.contains("scope link") && !shown.contains("via"),
        "{shown}"
    );
    Ok(())
}

#[test]
fn a_previous_result_is_passed_on_and_added_to() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "first",
        r#"#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
printf '%s' '{
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "tap0", "mac": "02:00:00:00:00:01"}],
    "ips": [{"address": "192.0.2.7/24", "interface": 0}],
    "routes": [{"dst": "203.0.113.0/24"}],
    "dns": {"nameservers": ["192.0.2.53"]}
}'
"#,
    )?;
    let mut ours = Network::dual_stack(&node);
    ours.as_object_mut().context("no object")?.remove("name");
    let network = Network::from_list(
        &node,
        json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "first"}, ours]}),
    );
    let pod = network.pod("pod")?;
    let result = pod.result();
    interface(result, "tap0")?;
    for ip in result["ips"].as_array().into_iter().flatten() {
        let index = ip["interface"]
            .as_u64()
            .context("an address of no interface")?;
        let name = &result["interfaces"][usize::try_from(index)?]["name"];
        let expected = if ip["address"] == "192.0.2.7/24" {
            "tap0"
        } else {
            "eth0"
        };
        ensure!(name == expected, "{result}");
    }
    ensure!(pod.addresses().len() == 3, "{result}");
    let routes = result["routes"].to_string();
    ensure!(
        routes.contains("203.0.113.0/24") && routes.contains("::/0"),
        "{routes}"
    );
    ensure!(
        strings(&result["dns"]["nameservers"]).contains(&"192.0.2.53"),
        "{result}"
    );
    // What the other plugin routed is not ours to set up.
    ensure!(!pod.run("ip route")?.contains("203.0.113.0"));
    network.check(pod.attachment())?;
    network.del(pod.attachment())?;
    Ok(())
}

// Options.

#[test]
fn vlan_options_are_error_2_and_name_key_and_value() -> Result<()> {
    let node = Node::new()?;
    for (key, value, shown) in [
        ("vlan", json!(100), "100"),
        ("vlanTrunk", json!([{"id": 101}]), "101"),
        ("vlanTrunk", json!([{"minID": 200, "maxID": 210}]), "200"),
    ] {
        let error = refused(&node, dual_stack_with(&node, json!({key: value})))?;
        ensure!(error.code == 2, "{error:?}");
        ensure!(
            error.msg.contains(key) && error.msg.contains(shown),
            "{error:?}"
        );
    }
    // The default is not a use of the option.
    attached(&node, "pod", dual_stack_with(&node, json!({"vlan": 0})))?;
    Ok(())
}

#[test]
fn options_that_exclude_each_other_are_error_7_and_named() -> Result<()> {
    let node = Node::new()?;
    let both = json!({"hairpinMode": true, "promiscMode": true});
    let error = refused(&node, dual_stack_with(&node, both))?;
    ensure!(error.code == 7, "{error:?}");
    ensure!(
        error.text().contains("hairpinMode") && error.text().contains("promiscMode"),
        "{error:?}"
    );
    let disabled = json!({"disableContainerInterface": true});
    let error = refused(&node, dual_stack_with(&node, disabled))?;
    ensure!(error.code == 7, "{error:?}");
    ensure!(
        error.text().contains("disableContainerInterface") && error.text().contains("ipam"),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn values_out_of_range_are_refused_and_the_key_named() -> Result<()> {
    let node = Node::new()?;
    for (key, value) in [
        ("mtu", json!(-1)),
        ("mtu", json!(5_000_000)),
        ("vlan", json!(4095)),
        ("bridge", json!("a/b")),
        ("bridge", json!("sixteen-bytes-ab")),
    ] {
        let error = refused(&node, dual_stack_with(&node, json!({key: value})))?;
        ensure!([2, 6, 7].contains(&error.code), "{key} {value}: {error:?}");
        ensure!(error.text().contains(key), "{key} {value}: {error:?}");
    }
    Ok(())
}

#[test]
fn an_mtu_too_small_for_ipv6_is_refused_where_there_is_ipv6() -> Result<()> {
    let node = Node::new()?;
    let error = refused(&node, dual_stack_with(&node, json!({"mtu": 1279})))?;
    for word in ["mtu", "1279", "1280"] {
        ensure!(error.text().contains(word), "{error:?}");
    }
    let ranges = json!([[{"subnet": Network::V4_SUBNET}]]);
    let mut config = dual_stack_with(&node, json!({"mtu": 1279}));
    config["ipam"]["ranges"] = ranges;
    let pod = attached(&node, "pod", config)?;
    ensure!(pod.device("eth0")?["mtu"] == 1279);
    node.ping(pod.v4()?.into(), 1)
}

#[test]
fn a_network_can_have_ipv6_alone() -> Result<()> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["ipam"]["ranges"] = json!([[{"subnet": Network::V6_SUBNET}]]);
    let network = Network::new(&node, config);
    let (a, b) = (network.pod("a")?, network.pod("b")?);
    ensure!(a.addresses() == [IpAddr::from(a.v6()?)], "{}", a.result());
    node.ping(a.v6()?.into(), 1)?;
    a.ping(b.v6()?.into(), 1)?;
    a.ping("fd77::1".parse()?, 1)?;
    ensure!(a.run("ip -4 addr show dev eth0")?.is_empty());
    ensure!(a.run("ip -4 route")?.is_empty());
    ensure!(node.sysctl("net.ipv4.ip_forward")? == "0");
    ensure!(node.sysctl("net.ipv6.conf.all.forwarding")? == "1");
    network.check(a.attachment())?;
    network.del(a.attachment())
}

#[test]
fn a_device_of_that_name_that_is_not_ours_is_refused_and_left_alone() -> Result<()> {
    let node = Node::new()?;
    // The programs, and the locks.
    let first = Network::new(&node, dual_stack_with(&node, json!({"bridge": "cni1"})));
    let pod = first.pod("first")?;
    first.del(pod.attachment())?;
    for kind in ["bridge", "veth"] {
        node.ip(&format!(
            "link add cni0 type {kind}\nlink set cni0 up\naddr add 192.0.2.1/24 dev cni0"
        ))?;
        let before = Snapshot::take(&node)?;
        let error = refused(&node, Network::dual_stack(&node))?;
        for word in ["bridge", "cni0", kind] {
            ensure!(error.text().contains(word), "{kind}: {error:?}");
        }
        let after = Snapshot::take(&node)?;
        let changes: Vec<_> = before
            .changes(&after)
            .into_iter()
            // The lock of the bridge stays.
            .filter(|change| change != "+file /run/bpf-bridge/bridges/cni0")
            .collect();
        ensure!(changes.is_empty(), "{kind}: {changes:#?}");
        node.ip("link del cni0")?;
    }
    Ok(())
}

#[test]
fn the_container_interface_can_be_left_down() -> Result<()> {
    let node = Node::new()?;
    let config = dual_stack_with(
        &node,
        json!({"disableContainerInterface": true, "isDefaultGateway": null, "ipam": null}),
    );
    let pod = attached(&node, "pod", config)?;
    let eth0 = pod.device("eth0")?;
    ensure!(!eth0["flags"].to_string().contains("\"UP\""), "{eth0}");
    Ok(())
}

#[test]
fn without_ipam_the_pod_has_a_link_and_no_address() -> Result<()> {
    let node = Node::new()?;
    for (name, ipam) in [("absent", Value::Null), ("empty", json!({}))] {
        let config = dual_stack_with(&node, json!({"isDefaultGateway": null, "ipam": ipam}));
        let network = Network::new(&node, config);
        let pod = network.pod(name)?;
        ensure!(pod.addresses().is_empty(), "{}", pod.result());
        let eth0 = pod.device("eth0")?;
        ensure!(eth0["flags"].to_string().contains("\"UP\""), "{eth0}");
        ensure!(pod.run("ip -4 addr show dev eth0")?.is_empty());
        network.check(pod.attachment())?;
        network.del(pod.attachment())?;
        ensure!(pod.device_names()? == ["lo"]);
    }
    Ok(())
}

#[test]
fn the_mac_comes_from_runtime_config_then_args_then_cni_args() -> Result<()> {
    let node = Node::new()?;
    let (variable, args, runtime) = (
        "02:00:00:00:00:01",
        json!({"cni": {"mac": "02:00:00:00:00:02"}}),
        json!("02:00:00:00:00:03"),
    );
    for (name, args, with_runtime, expected) in [
        ("variable", Value::Null, false, "02:00:00:00:00:01"),
        ("args", args.clone(), false, "02:00:00:00:00:02"),
        ("runtime", args, true, "02:00:00:00:00:03"),
    ] {
        let config = dual_stack_with(&node, json!({"args": args, "capabilities": {"mac": true}}));
        let network = Network::new(&node, config);
        let sandbox = node.sandbox(name)?;
        let mut attachment = sandbox
            .attachment()
            .args(&format!("IgnoreUnknown=1;MAC={variable}"));
        if with_runtime {
            attachment = attachment.capability("mac", runtime.clone());
        }
        let pod = network.pod_with(sandbox, attachment)?;
        ensure!(
            interface(pod.result(), "eth0")?["mac"] == expected,
            "{}",
            pod.result()
        );
        ensure!(MacAddr::of_device(&pod, "eth0")?.to_string() == expected);
        network.check(pod.attachment())?;
    }
    Ok(())
}

#[test]
fn a_bad_mac_is_refused_and_named() -> Result<()> {
    let node = Node::new()?;
    // The last is a group address, which no station can have.
    for mac in ["nonsense", "02:00:00:00:00", "01:00:5e:00:00:01"] {
        let config = dual_stack_with(&node, json!({"args": {"cni": {"mac": mac}}}));
        let error = refused(&node, config)?;
        ensure!(error.text().contains(mac), "{error:?}");
    }
    Ok(())
}

#[test]
fn the_mtu_is_set_on_both_ends_and_the_gateway_device() -> Result<()> {
    let node = Node::new()?;
    let pod = attached(&node, "pod", dual_stack_with(&node, json!({"mtu": 1400})))?;
    for device in [
        pod.device("eth0")?,
        node.device(pod.host_veth()?)?,
        node.device("cni0")?,
    ] {
        ensure!(device["mtu"] == 1400, "{device}");
    }
    Ok(())
}

#[test]
fn dns_of_the_configuration_replaces_that_of_ipam() -> Result<()> {
    let node = Node::new()?;
    node.within(|| {
        std::fs::write(
            "/run/resolv.conf",
            "nameserver 192.0.2.53\nsearch a.example b.example\noptions ndots:3\n",
        )?;
        Ok(())
    })?;
    let mut config = Network::dual_stack(&node);
    config["ipam"]["resolvConf"] = json!("/run/resolv.conf");
    let pod = attached(&node, "ipam", config.clone())?;
    let dns = &pod.result()["dns"];
    ensure!(strings(&dns["nameservers"]) == ["192.0.2.53"], "{dns}");
    ensure!(
        strings(&dns["search"]) == ["a.example", "b.example"],
        "{dns}"
    );
    ensure!(strings(&dns["options"]) == ["ndots:3"], "{dns}");

    config["dns"] = json!({"domain": "c.example"});
    let pod = attached(&node, "configured", config)?;
    let dns = &pod.result()["dns"];
    ensure!(dns["domain"] == "c.example", "{dns}");
    for key in ["nameservers", "search", "options"] {
        ensure!(strings(&dns[key]).is_empty(), "wholesale: {dns}");
    }
    Ok(())
}

#[test]
fn the_gateway_has_its_addresses_and_forwards_only_when_asked_to() -> Result<()> {
    for (gateway, default) in [(false, false), (true, false), (false, true)] {
        let node = Node::new()?;
        let config = dual_stack_with(
            &node,
            json!({"isGateway": gateway, "isDefaultGateway": default}),
        );
        let pod = attached(&node, "pod", config)?;
        let held = node.run("ip -o addr show dev cni0")?;
        let expected = gateway || default;
        for address in ["10.77.0.1/16", "fd77::1/64"] {
            ensure!(
                held.contains(address) == expected,
                "{gateway} {default}: {held}"
            );
        }
        for name in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            let on = node.sysctl(name)? == "1";
            ensure!(on == expected, "{gateway} {default}: {name} is {on}");
        }
        for (family, gateway) in [("-4", "10.77.0.1"), ("-6", "fd77::1")] {
            let routes = pod.run(&format!("ip {family} route show default"))?;
            ensure!(
                routes.contains(&format!("default via {gateway} ")) == default,
                "{default}: {routes}"
            );
        }
        ensure!(
            pod.result()["routes"]
                .as_array()
                .is_some_and(|r| !r.is_empty())
                == default
        );
    }
    Ok(())
}

#[test]
fn a_gateway_address_that_differs_is_refused_unless_forced() -> Result<()> {
    let node = Node::new()?;
    attached(&node, "first", Network::dual_stack(&node))?;
    let mut other = Network::dual_stack(&node);
    other["name"] = json!("other");
    other["ipam"]["ranges"] = json!([[{"subnet": "10.79.0.0/24"}], [{"subnet": "fd79::/64"}]]);
    let error = refused(&node, &other)?;
    ensure!(error.text().contains("10.77.0.1"), "{error:?}");
    other["forceAddress"] = json!(true);
    attached(&node, "second", other)?;
    let held = node.run("ip -4 -o addr show dev cni0")?;
    ensure!(
        held.contains("10.79.0.1/24") && !held.contains("10.77.0.1"),
        "{held}"
    );
    Ok(())
}

#[test]
fn the_named_bridge_is_used_and_cni0_by_default() -> Result<()> {
    let node = Node::new()?;
    attached(
        &node,
        "named",
        dual_stack_with(&node, json!({"bridge": "my.br-0"})),
    )?;
    ensure!(node.device_names()?.contains(&"my.br-0".to_owned()));
    ensure!(!node.device_names()?.contains(&"cni0".to_owned()));
    let mut config = dual_stack_with(&node, json!({"bridge": null, "name": "other"}));
    config["ipam"]["ranges"] = json!([[{"subnet": "10.78.0.0/24"}]]);
    attached(&node, "default", config)?;
    ensure!(node.device_names()?.contains(&"cni0".to_owned()));
    Ok(())
}

// Addresses.

#[test]
fn requested_addresses_are_given() -> Result<()> {
    let node = Node::new()?;
    let config = dual_stack_with(&node, json!({"capabilities": {"ips": true}}));
    let v4: IpAddr = "10.77.9.9".parse()?;
    let v6: IpAddr = "fd77::99".parse()?;

    let network = Network::new(&node, config.clone());
    let sandbox = node.sandbox("variable")?;
    let attachment = sandbox.attachment().args("IgnoreUnknown=1;IP=10.77.9.9");
    let pod = network.pod_with(sandbox, attachment)?;
    ensure!(pod.addresses()[0] == v4, "{}", pod.result());
    network.del(pod.attachment())?;

    let sandbox = node.sandbox("capability")?;
    let wanted = json!(["10.77.9.9/16", "fd77::99"]);
    let attachment = sandbox.attachment().capability("ips", wanted.clone());
    let pod = network.pod_with(sandbox, attachment)?;
    ensure!(pod.addresses() == [v4, v6], "{}", pod.result());

    // Taken, until it is given back.
    let mut in_args = config;
    in_args["args"] = json!({"cni": {"ips": ["10.77.9.9", "fd77::99"]}});
    let error = refused(&node, &in_args)?;
    ensure!(error.text().contains("10.77.9.9"), "{error:?}");
    network.del(pod.attachment())?;
    let pod = attached(&node, "args", in_args)?;
    ensure!(pod.addresses() == [v4, v6], "{}", pod.result());
    Ok(())
}

#[test]
fn ranges_can_come_from_the_runtime() -> Result<()> {
    let node = Node::new()?;
    let mut config = dual_stack_with(&node, json!({"capabilities": {"ipRanges": true}}));
    config["ipam"] = json!({"type": "host-local"});
    let network = Network::new(&node, config);
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment().capability(
        "ipRanges",
        json!([[{"subnet": "10.80.0.0/24", "rangeStart": "10.80.0.8"}], [{"subnet": "fd80::/64"}]]),
    );
    let pod = network.pod_with(sandbox, attachment)?;
    let expected: [IpAddr; 2] = ["10.80.0.8".parse()?, "fd80::2".parse()?];
    ensure!(pod.addresses() == expected, "{}", pod.result());
    network.check(pod.attachment())?;
    network.del(pod.attachment())
}

#[test]
fn the_legacy_single_range_is_understood() -> Result<()> {
    let node = Node::new()?;
    let config = dual_stack_with(
        &node,
        json!({"isDefaultGateway": null, "isGateway": true, "ipam": {
            "type": "host-local",
            "subnet": "10.81.0.0/24",
            "rangeStart": "10.81.0.10",
            "rangeEnd": "10.81.0.20",
            "gateway": "10.81.0.254",
            "routes": [{"dst": "0.0.0.0/0"}],
        }}),
    );
    let pod = attached(&node, "pod", config)?;
    ensure!(pod.addresses() == ["10.81.0.10".parse::<IpAddr>()?]);
    ensure!(pod.result()["ips"][0]["gateway"] == "10.81.0.254");
    ensure!(
        node.run("ip addr show dev cni0")?
            .contains("10.81.0.254/24")
    );
    ensure!(
        pod.run("ip route show default")?
            .contains("via 10.81.0.254")
    );
    Ok(())
}

#[test]
fn other_ipam_plugins_are_executed() -> Result<()> {
    let node = Node::new()?;
    let config = dual_stack_with(
        &node,
        json!({"ipam": {
            "type": "static",
            "addresses": [
                {"address": "10.82.0.5/24", "gateway": "10.82.0.1"},
                {"address": "fd82::5/64", "gateway": "fd82::1"},
            ],
            "routes": [{"dst": "203.0.113.0/24"}],
            "dns": {"nameservers": ["192.0.2.53"]},
        }}),
    );
    let network = Network::new(&node, config);
    let pod = network.pod("pod")?;
    let expected: [IpAddr; 2] = ["10.82.0.5".parse()?, "fd82::5".parse()?];
    ensure!(pod.addresses() == expected, "{}", pod.result());
    ensure!(strings(&pod.result()["dns"]["nameservers"]) == ["192.0.2.53"]);
    ensure!(
        pod.run("ip route show 203.0.113.0/24")?
            .contains("via 10.82.0.1")
    );
    pod.ping("10.82.0.1".parse()?, 1)?;
    network.check(pod.attachment())?;
    network.del(pod.attachment())
}

#[test]
fn an_ipam_plugin_sees_every_verb_and_its_error_is_passed_on() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "recording",
        r#"#!/bin/sh
echo "$CNI_COMMAND" >>/run/verbs
stdin=$(cat)
[ -e /run/fail ] && { echo '{"cniVersion":"1.0.0","code":123,"msg":"out of luck"}'; exit 1; }
[ "$CNI_COMMAND" = ADD ] || exit 0
case "$stdin" in *x-secret*) ;; *) exit 9 ;; esac
echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.83.0.5/24"}]}'
"#,
    )?;
    let config = dual_stack_with(
        &node,
        json!({"cniVersion": "1.1.0", "ipam": {"type": "recording", "x-secret": 1}}),
    );
    let network = Network::new(&node, config.clone());
    let pod = network.pod("pod")?;
    ensure!(
        pod.addresses() == ["10.83.0.5".parse::<IpAddr>()?],
        "{}",
        pod.result()
    );
    network.check(pod.attachment())?;
    for reply in network.status()? {
        reply.success()?;
    }
    network.gc(&[pod.attachment()])?;
    network.del(pod.attachment())?;
    let verbs = node.read("/run/verbs")?;
    ensure!(
        verbs.split('\n').collect::<Vec<_>>() == ["ADD", "CHECK", "STATUS", "GC", "DEL"],
        "{verbs:?}"
    );
    node.run("touch /run/fail")?;
    let error = refused(&node, &config)?;
    ensure!(error.text().contains("out of luck"), "{error:?}");
    for reply in network.status()? {
        ensure!(reply.failure()?.text().contains("out of luck"), "{reply:?}");
    }
    ensure!(network.gc(&[]).is_err());
    Ok(())
}

#[test]
fn an_ipam_plugin_gets_the_variables_and_the_configuration() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "recording",
        r#"#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH" >>/run/variables
cat >/run/stdin.$CNI_COMMAND
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.83.0.5/24"}]}'
"#,
    )?;
    let config = dual_stack_with(
        &node,
        json!({"cniVersion": "1.1.0", "ipam": {"type": "recording"}}),
    );
    let network = Network::new(&node, config);
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment().args("IgnoreUnknown=1;KEY=value");
    let pod = network.pod_with(sandbox, attachment)?;
    network.check(pod.attachment())?;
    network.gc(&[pod.attachment()])?;
    network.status()?.first().context("no reply")?.success()?;
    network.del(pod.attachment())?;
    let of_pod = format!(
        "pod /run/netns/pod eth0 IgnoreUnknown=1;KEY=value {}",
        Node::CNI_PATH
    );
    let of_none = format!("    {}", Node::CNI_PATH);
    let expected = [
        format!("ADD {of_pod}"),
        format!("CHECK {of_pod}"),
        format!("GC {of_none}"),
        format!("STATUS {of_none}"),
        format!("DEL {of_pod}"),
    ];
    let seen = node.read("/run/variables")?;
    ensure!(seen.lines().eq(&expected), "{seen}");
    for (verb, key) in [
        ("ADD", "name"),
        ("CHECK", "prevResult"),
        ("GC", "cni.dev/valid-attachments"),
        ("STATUS", "ipam"),
        ("DEL", "prevResult"),
    ] {
        let config = node.json(&format!("cat /run/stdin.{verb}"))?;
        ensure!(!config[key].is_null(), "{verb}: no {key} in {config}");
        ensure!(config["cniVersion"] == "1.1.0", "{verb}: {config}");
    }
    Ok(())
}

#[test]
fn an_ipam_plugin_is_only_looked_for_in_cni_path() -> Result<()> {
    let node = Node::new()?;
    for name in ["not-there", "../../../bin/true", "/bin/true"] {
        let config = dual_stack_with(&node, json!({"ipam": {"type": name}}));
        let error = refused(&node, config)?;
        ensure!(error.text().contains(name), "{error:?}");
    }
    Ok(())
}

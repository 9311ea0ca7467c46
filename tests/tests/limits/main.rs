//! Tables at their limits: an ADD that finds one full fails wholly and says which, and
//! flows are forgotten and found again; no pod fills what it shares with others.

mod forgotten;
mod full;
mod shares;

use anyhow::{Context as _, Result};
use bpf_bridge_tests::{Attachment, CniError, Network, Node, Verb};
use serde_json::{Value, json};

/// A node whose tables are as small as the test wants them.
fn node(limits: &Value) -> Result<Node> {
    let node = Node::new()?;
    node.set_settings(&json!({ "limits": limits }).to_string())?;
    Ok(node)
}

/// A dual-stack network that may publish ports, with more keys.
fn network<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    named(node, "net", more)
}

fn named<'node>(node: &'node Node, name: &str, more: &Value) -> Network<'node> {
    let mut config = Network::dual_stack(node);
    config["name"].take();
    config["cniVersion"].take();
    config["capabilities"] = json!({"portMappings": true});
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let list = json!({"cniVersion": "1.1.0", "name": name, "plugins": [config]});
    Network::from_list(node, list)
}

/// A second one, on a bridge of its own.
fn other_network<'node>(node: &'node Node, more: &Value) -> Network<'node> {
    let mut config = json!({
        "bridge": "cni1",
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
        },
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    named(node, "other", &config)
}

/// The error of an ADD that must fail.
fn refused(network: &Network, attachment: &Attachment) -> Result<CniError> {
    let configs = network.configs(Some(attachment))?;
    let config = configs.first().context("an empty list")?;
    network
        .call(config, Verb::Add)?
        .attachment(attachment)
        .run(network.node())?
        .failure()
}

//! Storms of calls: whatever callers do at once, the node has what the model has.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{
    Attachment, Network, Node, Pod, Snapshot, Tables, at_once,
    storm::{self, Storm, Weather},
};
use serde_json::json;

/// How many ADDs come at once.
const MANY: usize = 200;
/// How long callers do as they like, in so many rounds with pauses between.
const MINUTE: Duration = Duration::from_secs(60);
const ROUNDS: u32 = 5;

#[test]
fn two_hundred_adds_at_once() -> Result<()> {
    let quiet = many_at_once()?;
    // Where processors are busy, too, everyone gets the locks that he waits for.
    let done = AtomicBool::new(false);
    let end = Instant::now() + MINUTE;
    let busy = thread::scope(|scope| {
        for _ in 0..thread::available_parallelism()?.get() {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) && Instant::now() < end {
                    std::hint::spin_loop();
                }
            });
        }
        let took = many_at_once().context("on a busy machine");
        done.store(true, Ordering::Relaxed);
        took
    })?;
    println!("{MANY} ADDs at once took {quiet:?}, beside others {busy:?}");
    Ok(())
}

/// Adds and deletes them; says how long the ADDs took.
fn many_at_once() -> Result<Duration> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["cniVersion"] = json!("1.1.0");
    let network = Network::new(&node, config);
    let first = network.pod("first")?;
    let before = Snapshot::take(&node)?;
    let sandboxes = (0..MANY)
        .map(|number| node.sandbox(&format!("pod-{number}")))
        .collect::<Result<Vec<_>>>()?;
    let attachments: Vec<Attachment> = sandboxes.iter().map(|it| it.attachment()).collect();

    let began = Instant::now();
    let results = at_once(MANY, |number| network.add(&attachments[number]));
    let took = began.elapsed();
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(took < Duration::from_secs(60), "{took:?}");
    let addresses: BTreeSet<&str> = results
        .iter()
        .flat_map(|result| result["ips"].as_array().into_iter().flatten())
        .filter_map(|ip| ip["address"].as_str())
        .collect();
    ensure!(addresses.len() == 2 * MANY, "{}", addresses.len());
    Tables::read(&node)?.ensure_consistent()?;
    let pings = at_once(8, |thread| {
        for address in addresses.iter().skip(thread).step_by(8) {
            let (address, _) = address.split_once('/').context("no prefix")?;
            node.ping(address.parse()?, 1)?;
        }
        Ok(())
    });
    pings.into_iter().collect::<Result<()>>()?;

    let dels = at_once(MANY, |number| network.del(&attachments[number]));
    dels.into_iter().collect::<Result<()>>()?;
    before.ensure_same(&Snapshot::take(&node)?)?;
    network.check(first.attachment())?;
    Ok(took)
}

#[test]
fn status_finds_nothing_amiss_while_pods_come_and_go() -> Result<()> {
    let node = Node::new()?;
    let mut config = Network::dual_stack(&node);
    config["cniVersion"] = json!("1.1.0");
    let network = Network::new(&node, config);
    let _stays = network.pod("stays")?;
    let end = Instant::now() + Duration::from_secs(4);
    let done = at_once(8, |number| {
        let sandbox = node.sandbox(&format!("pod-{number}"))?;
        while Instant::now() < end {
            if number < 5 {
                ensure!(network.status()?.remove(0).success()?.is_null());
            } else {
                network.add(&sandbox.attachment())?;
                network.del(&sandbox.attachment())?;
            }
        }
        Ok(())
    });
    done.into_iter().collect()
}

#[test]
fn a_minute_of_everything_from_sixteen_callers_is_as_the_model() -> Result<()> {
    let seed = storm::seed()?;
    println!("BPF_BRIDGE_SEED={seed} repeats what each caller does");
    let node = Node::new()?;
    let _outside = node.outside()?;
    let mut storm = Storm::new(&node, seed);
    // One whom nobody touches.
    let stayers: Vec<(String, Pod)> = {
        let networks: Vec<_> = storm.networks().collect();
        networks
            .into_iter()
            .map(|(name, network)| Ok((name.to_owned(), network.pod(&format!("stays-{name}"))?)))
            .collect::<Result<_>>()?
    };
    for (name, pod) in &stayers {
        storm.spare(name, pod.attachment());
    }
    let weather = Weather {
        callers: 16,
        kills: false,
    };
    for _ in 0..ROUNDS {
        storm.rage(weather, MINUTE / ROUNDS)?;
        storm.pause()?;
    }
    let tally = storm.tally();
    println!("{:?}\nlongest: {:?}", tally.done, tally.longest);
    for (name, network) in storm.networks() {
        for (_, pod) in stayers.iter().filter(|(of, _)| of == name) {
            network.check(pod.attachment())?;
        }
    }
    storm.calm()?;
    storm.pause()?;
    ensure!(storm.attached() == 0);
    Ok(())
}

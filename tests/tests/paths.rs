//! Names, paths and what is found on the way: nothing that a runtime, a configuration or
//! another program on the node says leads the plugin out of its directories, keeps it
//! waiting, or has it run something.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Attachment, Call, Network, Node, Pod, Reply, Snapshot, Verb};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

/// What no call of this file takes, on a busy machine, unless it waits for something.
const AT_ONCE: Duration = Duration::from_secs(15);

fn config(node: &Node) -> Value {
    let mut config = Network::dual_stack(node);
    config["cniVersion"] = json!("1.1.0");
    config
}

/// With masquerade and a published port: all that is pinned and written there is.
fn whole(node: &Node) -> Value {
    let mut config = config(node);
    config["ipMasq"] = json!(true);
    config["capabilities"] = json!({"portMappings": true});
    config
}

fn ports() -> Value {
    json!([{"hostPort": 8080, "containerPort": 80}])
}

/// Kind, mode, size, link and name of every file of the node below some paths.
fn tree(node: &Node, paths: &str) -> Result<Vec<String>> {
    node.run(&format!("mkdir -p {paths}"))?;
    let listing = node.run(&format!("find {paths} -printf %y/%m/%s/%l/%p\\n"))?;
    let mut lines: Vec<_> = listing.lines().map(str::to_owned).collect();
    lines.sort();
    Ok(lines)
}

/// What a shell, a path or a format would read something else from.
const HOSTILE: &[&str] = &[
    ".",
    "..",
    "../x",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a/../../b",
    "a\nb",
    "a\r\neth0",
    "a b",
    "a\tb",
    "a:b",
    "%s%n",
    "a%d",
    "$(touch /run/pwned)",
    "`touch /run/pwned`",
    ";touch /run/pwned",
    "|sh",
    "&",
    "*",
    "~",
    "-rf",
    ".bpf-bridge",
    "a\\b",
    "\u{e9}",
    "a\u{202e}b",
    "\u{ff0f}etc",
];

fn hostile() -> Vec<String> {
    let long = [201, 255, 256, 4097, 100_000].map(|length| "a".repeat(length));
    let hostile = HOSTILE.iter().map(|&text| text.to_owned());
    hostile.chain(long).collect()
}

#[test]
fn hostile_ids_and_network_names_are_refused_by_every_verb() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let before = tree(&node, "/run /var/lib/cni /sys/fs/bpf")?;
    let of = |verb: Verb, config: &Value| {
        let mut config = config.clone();
        config["prevResult"] = json!({"cniVersion": "1.1.0"});
        config["cni.dev/valid-attachments"] = json!([]);
        Call::new(node.plugin(), verb)
            .attachment(&sandbox.attachment())
            .stdin(config)
    };
    for name in hostile() {
        for verb in [Verb::Add, Verb::Check, Verb::Del] {
            let error = of(verb, &config(&node))
                .env("CNI_CONTAINERID", &name)
                .run(&node)?
                .failure()
                .with_context(|| format!("{verb:?} of {name:?}"))?;
            ensure!(error.code == 4, "{error:?}");
            ensure!(error.text().contains("CNI_CONTAINERID"), "{error:?}");
        }
        let mut config = config(&node);
        config["name"] = json!(name);
        for verb in [Verb::Add, Verb::Check, Verb::Del, Verb::Gc, Verb::Status] {
            let error = of(verb, &config)
                .run(&node)?
                .failure()
                .with_context(|| format!("{verb:?} of network {name:?}"))?;
            ensure!(
                error.code == 7 && error.text().contains("name"),
                "{error:?}"
            );
        }
    }
    // No variable can have it, but JSON can.
    let mut nul = config(&node);
    nul["name"] = json!("a\0b");
    ensure!(of(Verb::Add, &nul).run(&node)?.failure()?.code == 7);
    ensure!(tree(&node, "/run /var/lib/cni /sys/fs/bpf")? == before);
    ensure!(sandbox.device_names()? == ["lo"]);
    Ok(())
}

/// The kernel takes more for an interface's name than a shell or a path would: what is
/// taken is what was asked for, to the letter.
#[test]
fn interface_and_bridge_names_are_taken_to_the_letter_or_refused() -> Result<()> {
    let node = Node::new()?;
    let sandbox = node.sandbox("pod")?;
    let mut taken = 0;
    for (number, name) in hostile().iter().enumerate() {
        let is_name = name.len() <= 15
            && !matches!(name.as_str(), "." | "..")
            && !name.contains(['/', ':', '%'])
            && !name.contains(char::is_whitespace);
        let mut own = config(&node);
        own["name"] = json!(format!("net{number}"));
        let as_ifname = Network::new(&node, own.clone());
        let attachment = sandbox.attachment().ifname(name);
        own["bridge"] = json!(name);
        let as_bridge = Network::new(&node, own);
        if is_name {
            taken += 1;
            as_ifname.add(&attachment).with_context(|| name.clone())?;
            ensure!(sandbox.device_names()? == ["lo", name]);
            as_ifname.check(&attachment)?;
            as_ifname.del(&attachment)?;
            let attachment = sandbox.attachment();
            as_bridge.add(&attachment).with_context(|| name.clone())?;
            ensure!(node.device_names()?.contains(name), "no {name:?}");
            as_bridge.check(&attachment)?;
            as_bridge.del(&attachment)?;
            as_bridge.gc(&[])?;
            continue;
        }
        let call = |verb| -> Result<Reply> {
            as_ifname
                .call(&as_ifname.configs(None)?[0], verb)?
                .attachment(&attachment)
                .run(&node)
        };
        for verb in [Verb::Add, Verb::Del] {
            let error = call(verb)?.failure().with_context(|| name.clone())?;
            ensure!(
                error.code == 4 && error.text().contains("CNI_IFNAME"),
                "{error:?}"
            );
        }
        let error = as_bridge.add(&sandbox.attachment()).err();
        let error = error.with_context(|| format!("bridge {name:?} was taken"))?;
        ensure!(format!("{error:#}").contains("bridge"), "{error:#}");
        // It may have become so since: what DEL needs is not the bridge's name.
        as_bridge.del(&sandbox.attachment())?;
    }
    ensure!(taken >= 8, "only {taken} were taken");
    ensure!(sandbox.device_names()? == ["lo"]);
    ensure!(node.run("ls -A /run")?.lines().all(|name| name != "pwned"));
    Ok(())
}

#[test]
fn a_lease_directory_that_is_no_absolute_path_is_refused() -> Result<()> {
    let node = Node::new()?;
    for directory in ["leases", "./leases", "../leases", "~/leases", "/run/a\0b"] {
        let mut config = config(&node);
        config["ipam"]["dataDir"] = json!(directory);
        let error = Network::new(&node, config).pod("pod").err();
        let error = format!("{:#}", error.with_context(|| directory.to_owned())?);
        ensure!(error.contains("dataDir"), "{error}");
    }
    Ok(())
}

/// Directories of the node that the plugin has no business in, one in each file system
/// that it writes to.
const OUTSIDE: [&str; 2] = ["/run/outside", "/var/lib/cni/outside"];

/// Makes something at a path of the node, in place of what is there.
fn plant(node: &Node, what: &str, path: &str) -> Result<()> {
    let parent = Path::new(path).parent().context("a path in a directory")?;
    node.run(&format!("mkdir -p {}", parent.display()))?;
    node.run(&format!("rm -rf {path}"))?;
    let outside = OUTSIDE[usize::from(path.starts_with("/var"))];
    let command = match what {
        "pipe" => format!("mkfifo {path}"),
        "directory" => format!("mkdir {path}"),
        "device" => format!("mknod {path} c 1 5"),
        "hard link" => format!("ln {outside}/file {path}"),
        "link to a file" => format!("ln -s {outside}/file {path}"),
        "link to a directory" => format!("ln -s {outside} {path}"),
        "link to nothing" => format!("ln -s {outside}/nothing {path}"),
        other => anyhow::bail!("planting {other}"),
    };
    node.run(&command).map(drop)
}

/// The plugin under a name by which it is killed when it waits for something.
fn hasty(node: &Node) -> Result<&'static str> {
    let (plugin, seconds) = (node.plugin(), AT_ONCE.as_secs());
    let path = Node::CNI_PATH;
    let script = format!("#!/bin/sh\nexec timeout -s KILL {seconds} {path}/{plugin}\n");
    node.install_script("hasty", &script)?;
    Ok("hasty")
}

const PLANTS: [&str; 7] = [
    "pipe",
    "directory",
    "device",
    "hard link",
    "link to a file",
    "link to a directory",
    "link to nothing",
];

/// Whatever stands where the plugin keeps its files, every verb ends at once, says what is
/// wrong if it fails, and changes nothing outside; and when it is gone, all is well.
#[test]
fn what_is_planted_in_state_directories_is_not_followed() -> Result<()> {
    let node = Node::new()?;
    for directory in OUTSIDE {
        node.run(&format!("mkdir -p {directory}"))?;
        node.run(&format!("cp /etc/hostname {directory}/file"))?;
    }
    let outside = || -> Result<String> {
        let mut all = tree(&node, &OUTSIDE.join(" "))?.join("\n");
        for directory in OUTSIDE {
            all += &node.read(format!("{directory}/file"))?;
        }
        Ok(all)
    };
    let before = outside()?;
    // Loads the programs, so that what follows is quick.
    let mut first = config(&node);
    first["name"] = json!("first");
    let first = Network::new(&node, first);
    let _stays = first.pod("stays")?;

    let records = "/run/bpf-bridge/attachments";
    let leases = "/var/lib/cni/networks";
    let places = [
        format!("{records}/net/pod:eth0"),
        format!("{records}/net"),
        "/run/bpf-bridge/bridges/cni1".to_owned(),
        format!("{leases}/net"),
        format!("{leases}/net/lock"),
        format!("{leases}/net/10.88.0.2"),
        format!("{leases}/net/last_reserved_ip.0"),
        format!("{leases}/.bpf-bridge/net"),
        format!("{leases}/.bpf-bridge/net/state"),
        format!("{leases}/.bpf-bridge/net/pod:eth0"),
    ];
    let mut own = config(&node);
    own["type"] = json!(hasty(&node)?);
    own["bridge"] = json!("cni1");
    own["ipam"]["ranges"] = json!([[{"subnet": "10.88.0.0/29"}]]);
    let network = Network::new(&node, own);
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment();
    let config = |verb| -> Result<Value> {
        let mut config = network.configs(None)?[0].clone();
        if verb == Verb::Gc {
            config["cni.dev/valid-attachments"] = json!([]);
        }
        Ok(config)
    };
    for place in &places {
        for what in PLANTS {
            plant(&node, what, place)?;
            for verb in [Verb::Add, Verb::Del, Verb::Status, Verb::Gc] {
                let context = || format!("{verb:?} with a {what} at {place}");
                let reply = network
                    .call(&config(verb)?, verb)?
                    .attachment(&attachment)
                    .run(&node)?;
                if !reply.status.success() {
                    let error = reply.failure().with_context(context)?;
                    let name = place.rsplit('/').next().unwrap_or_default();
                    ensure!(error.text().contains(name), "{}: {error:?}", context());
                }
                ensure!(outside()? == before, "{}: {}", context(), outside()?);
            }
            node.run(&format!("rm -rf {place}"))?;
            network.del(&attachment)?;
            ensure!(sandbox.device_names()? == ["lo"], "a {what} at {place}");
            network
                .add(&attachment)
                .with_context(|| format!("after a {what} at {place}"))?;
            network.del(&attachment)?;
        }
    }
    ensure!(outside()? == before);
    Ok(())
}

#[test]
fn a_pipe_in_place_of_a_resolver_configuration_or_a_sandbox_is_not_waited_for() -> Result<()> {
    let node = Node::new()?;
    node.run("mkfifo /run/pipe")?;
    let mut own = config(&node);
    own["ipam"]["resolvConf"] = json!("/run/pipe");
    own["type"] = json!(hasty(&node)?);
    Network::new(&node, own).pod("pod")?;
    let attachment = Attachment::new("other", "/run/pipe", "eth0");
    let error = Call::new("hasty", Verb::Add)
        .attachment(&attachment)
        .stdin(config(&node))
        .run(&node)?
        .failure()?;
    ensure!(error.code == 8, "{error:?}");
    Ok(())
}

/// Calls the plugin with a umask.
fn under_umask(node: &Node, umask: &str) -> Result<String> {
    let name = format!("umask{umask}");
    let script = format!(
        "#!/bin/sh\numask {umask}\nexec {}/{}\n",
        Node::CNI_PATH,
        node.plugin()
    );
    node.install_script(&name, &script)?;
    Ok(name)
}

#[test]
fn files_and_directories_have_the_narrowest_modes_whatever_the_umask() -> Result<()> {
    // Of directories, files and links: ours are root's alone, the lease directory is the
    // stock plugin's, which shows who has which address.
    for umask in ["0000", "0777"] {
        let node = Node::new()?;
        let outside = node.outside()?;
        node.run("mkdir -m 1777 /run/wide")?;
        // The node of the tests has it already.
        node.run("rm -rf /run/bpf-bridge")?;
        let mut config = whole(&node);
        config["type"] = json!(under_umask(&node, umask)?);
        config["ipam"]["dataDir"] = json!("/run/wide/leases");
        let network = Network::new(&node, config);
        let pod = network.pod_with_ports("pod", ports())?;
        network.check(pod.attachment())?;
        for reply in network.status()? {
            reply.success()?;
        }
        let mut kinds = BTreeMap::new();
        for line in tree(
            &node,
            "/run/bpf-bridge /sys/fs/bpf/bpf-bridge /run/wide/leases",
        )? {
            let mut parts = line.splitn(5, '/');
            let (Some(kind), Some(mode), Some(path)) = (parts.next(), parts.next(), parts.nth(2))
            else {
                continue;
            };
            let leases = ["/run/wide/leases", "/run/wide/leases/net"].contains(&path);
            let most = match kind {
                "d" if leases => 0o755,
                "d" => 0o700,
                // Nobody asks what mode a symbolic link has.
                "l" => continue,
                _ => 0o600,
            };
            let mode = u32::from_str_radix(mode, 8)?;
            ensure!(mode & !most == 0, "umask {umask}: {line}");
            if umask == "0000" {
                ensure!(mode == most, "{line}");
            }
            *kinds.entry(kind.to_owned()).or_insert(0) += 1;
        }
        ensure!(kinds["d"] >= 8 && kinds["f"] >= 25, "{kinds:?}");
        network.gc(&[pod.attachment()])?;
        network.del(pod.attachment())?;
        drop(outside);
    }
    Ok(())
}

/// The programs that calls of the plugin have executed, each as often as it was.
fn executed(node: &Node) -> Result<Vec<String>> {
    let trace = node.read("/run/trace")?;
    let programs = trace.lines().filter_map(|line| {
        let (_, rest) = line.split_once("exec")?;
        Some(rest.split('"').nth(1)?.to_owned())
    });
    Ok(programs.collect())
}

/// All verbs, and each with something to do.
fn every_verb(network: &Network, ports: Value) -> Result<()> {
    let pod = network.pod_with_ports("pod", ports)?;
    network.check(pod.attachment())?;
    for reply in network.status()? {
        reply.success()?;
    }
    network.gc(&[pod.attachment()])?;
    network.del(pod.attachment())?;
    network.gc(&[])
}

#[test]
fn nothing_is_executed_but_the_ipam_plugin_that_was_named() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let plugin = format!("{}/{}", Node::CNI_PATH, node.plugin());
    node.install_script(
        "traced",
        &format!(
            "#!/bin/sh\nexec strace -f -qq -A -o /run/trace -e trace=execve,execveat {plugin}\n"
        ),
    )?;
    let mut config = whole(&node);
    config["type"] = json!("traced");
    for backend in ["ebpf", "nftables"] {
        node.run("rm -f /run/trace")?;
        config["ipMasqBackend"] = json!(backend);
        every_verb(&Network::new(&node, config.clone()), ports())?;
        let programs = executed(&node)?;
        ensure!(
            programs == vec![plugin.clone(); 6],
            "{backend}: {programs:?}"
        );
    }
    node.run("rm -f /run/trace")?;
    config["ipam"] = json!({"type": "static", "addresses": [{"address": "10.77.0.5/16"}]});
    // Its GC and STATUS are of another version of the protocol.
    config["cniVersion"] = json!("1.0.0");
    let network = Network::new(&node, config);
    let pod = network.pod("static")?;
    network.check(pod.attachment())?;
    network.del(pod.attachment())?;
    let programs = executed(&node)?;
    let ipam = format!("{}/static", Node::CNI_PATH);
    ensure!(
        programs == [&plugin, &ipam, &plugin, &ipam, &plugin, &ipam].map(String::as_str),
        "{programs:?}"
    );
    Ok(())
}

/// A node on which there is no shell, no `ip`, no `nft`, no library and no `/etc`.
#[test]
fn nothing_of_the_node_is_needed() -> Result<()> {
    let node = Node::new()?;
    let _outside = node.outside()?;
    let mut config = whole(&node);
    config["prevResult"] = Value::Null;
    config["runtimeConfig"] = json!({"portMappings": ports()});
    let sandbox = node.sandbox("pod")?;
    let call = |verb, config: &Value| {
        Call::new(node.plugin(), verb)
            .attachment(&sandbox.attachment())
            .stdin(config)
    };
    node.within(|| {
        unshare(CloneFlags::CLONE_NEWNS).context("leaving the mount namespace")?;
        for directory in [
            "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/opt", "/home",
        ] {
            // On a Debian of today some are links into /usr, which is hidden first.
            if fs::canonicalize(directory).is_ok_and(|real| real == Path::new(directory)) {
                let kind = Some("tmpfs");
                mount(kind, directory, kind, MsFlags::empty(), None::<&str>)
                    .with_context(|| format!("hiding {directory}"))?;
            }
        }
        ensure!(!Path::new("/bin/sh").exists() && !Path::new("/etc/passwd").exists());
        for backend in ["ebpf", "nftables"] {
            let mut config = config.clone();
            config["ipMasqBackend"] = json!(backend);
            let result = call(Verb::Add, &config).run_here()?.success()?;
            config["prevResult"] = result;
            call(Verb::Check, &config).run_here()?.success()?;
            call(Verb::Status, &config).run_here()?.success()?;
            call(Verb::Del, &config).run_here()?.success()?;
            config["cni.dev/valid-attachments"] = json!([]);
            call(Verb::Gc, &config).run_here()?.success()?;
        }
        Ok(())
    })
}

#[test]
fn an_ipam_plugin_gets_the_runtimes_environment_and_no_descriptor() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "curious",
        r#"#!/bin/sh
cat >/dev/null
tr '\0' '\n' </proc/$$/environ >/run/environment.$CNI_COMMAND
for fd in /proc/$$/fd/*; do echo ${fd##*/}; done >/run/descriptors.$CNI_COMMAND
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.83.0.5/24"}]}'
"#,
    )?;
    let mut own = config(&node);
    own["ipam"] = json!({"type": "curious"});
    let sandbox = node.sandbox("pod")?;
    let attachment = sandbox.attachment();
    let names = [
        ("CNI_CONTAINERID", "pod"),
        ("CNI_NETNS", "/run/netns/pod"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", Node::CNI_PATH),
    ];
    let descriptors = |verb: Verb| -> Result<BTreeSet<String>> {
        let text = node.read(format!("/run/descriptors.{}", verb.as_str()))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    // Those that a runtime gives it, or leaves open, and its shell's own.
    Call::new("curious", Verb::Status).run(&node)?.success()?;
    let given = descriptors(Verb::Status)?;
    let mut previous = Value::Null;
    for verb in [Verb::Add, Verb::Check, Verb::Del] {
        own["prevResult"] = previous;
        previous = Call::new(node.plugin(), verb)
            .attachment(&attachment)
            .env("OF_THE_RUNTIME", "1")
            .stdin(&own)
            .run(&node)?
            .success()?;
        if previous.is_null() {
            previous = own["prevResult"].take();
        }
        let text = node.read(format!("/run/environment.{}", verb.as_str()))?;
        let seen: BTreeSet<_> = text.lines().map(str::to_owned).collect();
        let expected: BTreeSet<_> = env::vars()
            .filter(|(name, value)| !name.starts_with("CNI_") && !value.contains('\n'))
            .chain(names.map(|(name, value)| (name.to_owned(), value.to_owned())))
            .chain([("OF_THE_RUNTIME".to_owned(), "1".to_owned())])
            .chain([("CNI_COMMAND".to_owned(), verb.as_str().to_owned())])
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        ensure!(
            expected == seen,
            "{verb:?}: {seen:?} in place of {expected:?}"
        );

        let seen = descriptors(verb)?;
        ensure!(seen == given, "{verb:?}: {seen:?} in place of {given:?}");
    }
    Ok(())
}

#[test]
fn an_ipam_plugin_is_not_looked_for_where_the_runtime_happens_to_be() -> Result<()> {
    let node = Node::new()?;
    let mut own = config(&node);
    own["ipam"] = json!({"type": "static", "addresses": [{"address": "10.77.0.5/16"}]});
    let sandbox = node.sandbox("pod")?;
    for path in ["bin", ".", "../lib/cni", "/nowhere:usr/lib/cni"] {
        let error = Call::new(node.plugin(), Verb::Add)
            .attachment(&sandbox.attachment())
            .env("CNI_PATH", path)
            .stdin(&own)
            .run(&node)?
            .failure()?;
        ensure!(
            error.code == 4 && error.text().contains("CNI_PATH"),
            "{error:?}"
        );
    }
    ensure!(sandbox.device_names()? == ["lo"]);
    Ok(())
}

/// What an IPAM plugin answers is believed as far as it can be, and else refused, whole.
#[test]
fn nonsense_of_an_ipam_plugin_is_refused_and_leaves_nothing() -> Result<()> {
    let node = Node::new()?;
    node.install_script(
        "nonsense",
        "#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = ADD ] && cat /run/answer\nexit 0\n",
    )?;
    let mut own = config(&node);
    own["ipam"] = json!({"type": "nonsense"});
    // Once without a gateway, whose addresses stay with the bridge.
    own["isDefaultGateway"] = json!(false);
    let network = Network::new(&node, own.clone());
    own["isDefaultGateway"] = json!(true);
    let with_gateway = Network::new(&node, own);
    let mut warm = config(&node);
    warm["name"] = json!("warm");
    let _warm = Network::new(&node, warm).pod("warm")?;
    let sandbox = node.sandbox("pod")?;
    let before = Snapshot::take(&node)?;
    let address = |text: &str| json!({"ips": [{"address": text}]});
    let many: Vec<_> = (0..70_000)
        .map(|n| json!({"address": format!("10.{}.{}.{}/8", n >> 16, n >> 8 & 255, n & 255)}))
        .collect();
    let answers = [
        json!({}),
        json!([]),
        json!("10.0.0.1/8"),
        address("255.255.255.255/32"),
        address("255.255.255.255/0"),
        address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"),
        address("ff02::1/64"),
        address("::ffff:10.0.0.1/120"),
        address("::/0"),
        address("10.0.0.1/33"),
        address("10.0.0.1/-1"),
        address("10.0.0.1/8\n"),
        json!({"ips": [{"address": "10.9.0.2/24", "gateway": "fd00::1"}]}),
        json!({"ips": [{"address": "10.9.0.2/24", "gateway": "10.9.0.2"}]}),
        json!({"ips": [{"address": "10.9.0.2/24"}, {"address": "10.9.0.2/24"}]}),
        json!({"ips": [{"address": "10.9.0.2/24", "interface": 2147483647}]}),
        json!({"ips": [{"address": "10.9.0.2/24", "interface": 4294967296_u64}]}),
        json!({"ips": [{"address": "10.9.0.2/24"}], "routes": [{"dst": "0.0.0.0/0", "gw": "::1"}]}),
        json!({"ips": [{"address": "10.9.0.2/24"}], "routes": [{"dst": "10.10.0.0/16", "table": 4294967295_u32}]}),
        json!({"ips": many}),
    ];
    for (network, alone) in [(&network, true), (&with_gateway, false)] {
        for answer in &answers {
            let text = answer.to_string();
            let shown: String = text.chars().take(100).collect();
            node.within(|| Ok(fs::write("/run/answer", &text)?))?;
            let began = Instant::now();
            let refusals = [
                ("::ffff:", "IPv4 address"),
                ("fd00::1", "same family"),
                ("10.0.0.0/8", "256 at most"),
            ];
            let expected = refusals.iter().find(|(part, _)| shown.contains(part));
            match serve(network, &sandbox.attachment()) {
                Ok(()) => ensure!(expected.is_none(), "{shown} was taken"),
                Err(error) => {
                    let error = format!("{error:#}");
                    // A signal or words that are no JSON would be told as such.
                    ensure!(!error.contains("signal"), "{shown}: {error}");
                    let word = expected.map_or("", |(_, word)| word);
                    ensure!(error.contains(word), "{shown}: {error}");
                }
            }
            let took = began.elapsed();
            ensure!(took < AT_ONCE, "{shown}: it took {took:?}");
            ensure!(sandbox.device_names()? == ["lo"], "{shown}");
            if alone {
                before
                    .ensure_same(&Snapshot::take(&node)?)
                    .with_context(|| shown.clone())?;
            }
        }
    }
    Ok(())
}

/// ADD, and if that succeeds all that comes after.
fn serve(network: &Network, attachment: &Attachment) -> Result<()> {
    network.add(attachment)?;
    for done in [network.check(attachment), network.del(attachment)] {
        done.map_err(|error| error.context("a signal of what ADD should have refused"))?;
    }
    Ok(())
}

#[test]
fn stdin_without_an_end_is_refused_in_bounded_memory() -> Result<()> {
    let node = Node::new()?;
    // What is no JSON, and what is for ever about to be.
    for (name, source) in [
        ("zeroes", "cat /dev/zero"),
        ("blanks", "yes ''"),
        ("lists", "yes '['"),
    ] {
        let script = format!(
            "#!/bin/sh\n{source} 2>/dev/null | (ulimit -v 262144; exec {}/{})\n",
            Node::CNI_PATH,
            node.plugin()
        );
        node.install_script(name, &script)?;
        let error = Call::new(name, Verb::Status)
            .run(&node)?
            .failure()
            .with_context(|| name.to_owned())?;
        ensure!(
            error.code == 6 && error.text().contains("larger"),
            "{error:?}"
        );
    }
    Ok(())
}

/// All addresses that there are, and all but a few.
#[test]
fn ranges_of_all_addresses_are_given_out_from_at_once() -> Result<()> {
    let node = Node::new()?;
    let mut own = config(&node);
    own["isDefaultGateway"] = json!(false);
    own["ipam"]["ranges"] = json!([
        [{"subnet": "0.0.0.0/0", "rangeStart": "10.77.0.5", "gateway": "10.77.0.1"}],
        [{"subnet": "::/0", "rangeStart": "fd77::5", "gateway": "fd77::1"}],
    ]);
    let network = Network::new(&node, own.clone());
    let began = Instant::now();
    let given = |pod: &Pod| pod.addresses();
    let first = network.pod("first")?;
    let second = network.pod("second")?;
    ensure!(given(&first) == ["10.77.0.5".parse::<IpAddr>()?, "fd77::5".parse()?]);
    ensure!(given(&second) == ["10.77.0.6".parse::<IpAddr>()?, "fd77::6".parse()?]);
    // The last one there is; then it begins again.
    node.within(|| {
        let directory = Path::new("/var/lib/cni/networks/net");
        fs::write(directory.join("last_reserved_ip.0"), "255.255.255.254")?;
        let last = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        Ok(fs::write(directory.join("last_reserved_ip.1"), last)?)
    })?;
    let third = network.pod("third")?;
    ensure!(given(&third) == ["10.77.0.7".parse::<IpAddr>()?, "fd77::7".parse()?]);
    ensure!(began.elapsed() < AT_ONCE * 2);
    Ok(())
}

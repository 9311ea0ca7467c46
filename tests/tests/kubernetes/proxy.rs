//! What kube-proxy writes: the same chains, maps and rules, in the same order, for
//! services of the tests' own.

use std::{
    collections::hash_map::DefaultHasher,
    fmt::Write as _,
    hash::{Hash as _, Hasher as _},
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bpf_bridge_tests::{Namespace, Network, Node, Outside};

/// kube-proxy's `--proxy-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Iptables,
    Nftables,
}

/// A service with one port, the same for TCP and UDP, in both families.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    name: String,
    cluster_ips: [IpAddr; 2],
    port: u16,
    node_port: Option<u16>,
    external: ExternalTrafficPolicy,
    endpoints: Vec<SocketAddr>,
}

/// `externalTrafficPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExternalTrafficPolicy {
    /// To any endpoint, masqueraded.
    Cluster,
    /// To endpoints of this node, as whoever asks.
    Local,
}

impl Service {
    /// A `ClusterIP` service; each endpoint counts for its own family.
    pub(crate) fn new(
        name: &str,
        cluster_ips: [IpAddr; 2],
        port: u16,
        endpoints: impl IntoIterator<Item = SocketAddr>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            cluster_ips,
            port,
            node_port: None,
            external: ExternalTrafficPolicy::Cluster,
            endpoints: endpoints.into_iter().collect(),
        }
    }

    /// The same as a `NodePort` service.
    pub(crate) fn node_port(mut self, port: u16, policy: ExternalTrafficPolicy) -> Self {
        self.node_port = Some(port);
        self.external = policy;
        self
    }
}

/// Writes the rules for all services into a node, as one kube-proxy for each family, with
/// `--cluster-cidr` as the network's subnets.
pub(crate) fn write(node: &Node, mode: Mode, services: &[Service]) -> Result<()> {
    for family in [Family::V4, Family::V6] {
        match mode {
            Mode::Iptables => restore(node, family, &iptables(family, services))?,
            Mode::Nftables => feed(node, "nft", &["-f", "-"], &nftables(family, services))?,
        }
    }
    if mode == Mode::Iptables {
        jumps(node)?;
        // For node ports on 127.0.0.1, by `--iptables-localhost-nodeports`.
        node.set_sysctl("net.ipv4.conf.all.route_localnet", "1")?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn has(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    /// The pods' addresses.
    fn cluster_cidr(self) -> &'static str {
        match self {
            Self::V4 => Network::V4_SUBNET,
            Self::V6 => Network::V6_SUBNET,
        }
    }

    fn node(self) -> IpAddr {
        match self {
            Self::V4 => Outside::NODE_V4.into(),
            Self::V6 => Outside::NODE_V6.into(),
        }
    }

    fn iptables(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    /// nft's name of the family, which is also what its matches begin with.
    fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }
}

/// One port of a service, of one family and protocol, as kube-proxy treats it.
struct ServicePort<'a> {
    service: &'a Service,
    protocol: &'static str,
    family: Family,
    cluster_ip: IpAddr,
    endpoints: Vec<SocketAddr>,
}

impl<'a> ServicePort<'a> {
    fn all(family: Family, services: &'a [Service]) -> Vec<Self> {
        let of_family = |service: &'a Service| {
            let endpoints = service.endpoints.iter().copied();
            let endpoints: Vec<_> = endpoints.filter(|at| family.has(at.ip())).collect();
            let cluster_ip = service.cluster_ips[usize::from(family == Family::V6)];
            ["tcp", "udp"].map(|protocol| Self {
                service,
                protocol,
                family,
                cluster_ip,
                endpoints: endpoints.clone(),
            })
        };
        services.iter().flat_map(of_family).collect()
    }

    /// The name in comments, and in what names are made of.
    fn name(&self) -> String {
        format!("tests/{}:{}", self.service.name, self.protocol)
    }

    fn is_local(&self) -> bool {
        self.service.external == ExternalTrafficPolicy::Local
    }

    /// The endpoints that are pods of this node.
    fn local_endpoints(&self) -> Vec<SocketAddr> {
        let subnet = match self.family {
            Family::V4 => "10.77.",
            Family::V6 => "fd77:",
        };
        let endpoints = self.endpoints.iter().copied();
        endpoints
            .filter(|at| at.ip().to_string().starts_with(subnet))
            .collect()
    }
}

/// `length` letters that stand for `parts`, in place of kube-proxy's shortened SHA-256.
fn letters(length: usize, parts: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    let mut rest = u128::from(hasher.finish()) * 0x1_0000_0001_0000_0001;
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut text = String::new();
    for _ in 0..length {
        text.push(char::from(
            alphabet[usize::try_from(rest % 32).unwrap_or(0)],
        ));
        rest /= 32;
    }
    text
}

// Mode iptables.

/// The rules that lead into kube-proxy's chains, each put before what is there.
fn jumps(node: &Node) -> Result<()> {
    let new = "-m conntrack --ctstate NEW";
    let jumps = [
        ("filter", "INPUT", new, "KUBE-EXTERNAL-SERVICES"),
        ("filter", "FORWARD", new, "KUBE-EXTERNAL-SERVICES"),
        ("filter", "INPUT", "", "KUBE-NODEPORTS"),
        ("filter", "FORWARD", new, "KUBE-SERVICES"),
        ("filter", "OUTPUT", new, "KUBE-SERVICES"),
        ("filter", "FORWARD", "", "KUBE-FORWARD"),
        ("filter", "INPUT", new, "KUBE-PROXY-FIREWALL"),
        ("filter", "OUTPUT", new, "KUBE-PROXY-FIREWALL"),
        ("filter", "FORWARD", new, "KUBE-PROXY-FIREWALL"),
        ("filter", "INPUT", "", "KUBE-FIREWALL"),
        ("filter", "OUTPUT", "", "KUBE-FIREWALL"),
        ("nat", "OUTPUT", "", "KUBE-SERVICES"),
        ("nat", "PREROUTING", "", "KUBE-SERVICES"),
        ("nat", "POSTROUTING", "", "KUBE-POSTROUTING"),
    ];
    for family in [Family::V4, Family::V6] {
        let saved = node.run(&format!("{}-save", family.iptables()))?;
        if saved.contains("-A PREROUTING -j KUBE-SERVICES") {
            continue;
        }
        let mut rules = String::new();
        for table in ["filter", "nat"] {
            writeln!(rules, "*{table}")?;
            for (_, chain, state, target) in jumps.iter().filter(|jump| jump.0 == table) {
                writeln!(rules, "-I {chain} {state} -j {target}")?;
            }
            writeln!(rules, "COMMIT")?;
        }
        restore(node, family, &rules)?;
    }
    Ok(())
}

fn restore(node: &Node, family: Family, rules: &str) -> Result<()> {
    let program = format!("{}-restore", family.iptables());
    feed(node, &program, &["-w", "5", "--noflush"], rules)
}

fn iptables(family: Family, services: &[Service]) -> String {
    let ports = ServicePort::all(family, services);
    let mut chains = vec![
        "KUBE-SERVICES".to_owned(),
        "KUBE-NODEPORTS".to_owned(),
        "KUBE-POSTROUTING".to_owned(),
        "KUBE-MARK-MASQ".to_owned(),
    ];
    let mut rules = vec![
        "KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN".to_owned(),
        "KUBE-POSTROUTING -j MARK --xor-mark 0x4000".to_owned(),
        "KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" \
         -j MASQUERADE --random-fully"
            .to_owned(),
        "KUBE-MARK-MASQ -j MARK --or-mark 0x4000".to_owned(),
    ];
    for port in &ports {
        service_chains(port, &mut chains, &mut rules);
    }
    rules.push(
        "KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be \
         the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
            .to_owned(),
    );
    let nat = table("nat", &chains, &rules);
    format!("{}{nat}", iptables_filter(family, &ports))
}

fn table(name: &str, chains: &[String], rules: &[String]) -> String {
    let chains = chains.iter().map(|chain| format!(":{chain} - [0:0]\n"));
    let rules = rules.iter().map(|rule| format!("-A {rule}\n"));
    let lines: String = chains.chain(rules).collect();
    format!("*{name}\n{lines}COMMIT\n")
}

fn iptables_filter(family: Family, ports: &[ServicePort<'_>]) -> String {
    let chains = [
        "KUBE-NODEPORTS",
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
        "KUBE-FIREWALL",
        "KUBE-FORWARD",
        "KUBE-PROXY-FIREWALL",
    ]
    .map(str::to_owned);
    let mut rules = vec![
        "KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP".to_owned(),
        "KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" \
         -m mark --mark 0x4000/0x4000 -j ACCEPT"
            .to_owned(),
        "KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" \
         -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
            .to_owned(),
    ];
    if family == Family::V4 {
        rules.push(
            "KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" \
             -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT \
             -j DROP"
                .to_owned(),
        );
    }
    for port in ports.iter().filter(|port| port.endpoints.is_empty()) {
        let (name, protocol, at) = (port.name(), port.protocol, port.service.port);
        rules.push(format!(
            "KUBE-SERVICES -m comment --comment \"{name} has no endpoints\" -m {protocol} \
             -p {protocol} -d {} --dport {at} -j REJECT",
            port.cluster_ip
        ));
    }
    table("filter", &chains, &rules)
}

/// What belongs to one port of a service, in the table `nat`.
fn service_chains(port: &ServicePort<'_>, chains: &mut Vec<String>, rules: &mut Vec<String>) {
    if port.endpoints.is_empty() {
        return;
    }
    let (name, protocol, number) = (port.name(), port.protocol, port.service.port);
    let (cluster_ip, pods) = (port.cluster_ip, port.family.cluster_cidr());
    let id = letters(16, &[&name]);
    let cluster = format!("KUBE-SVC-{id}");
    let addressed = format!(
        "-m comment --comment \"{name} cluster IP\" -m {protocol} -p {protocol} -d {cluster_ip} \
         --dport {number}"
    );
    rules.push(format!("KUBE-SERVICES {addressed} -j {cluster}"));
    chains.push(cluster.clone());
    rules.push(format!(
        "{cluster} {addressed} ! -s {pods} -j KUBE-MARK-MASQ"
    ));
    balance(port, &cluster, &port.endpoints, rules);

    if let Some(node_port) = port.service.node_port {
        let external = format!("KUBE-EXT-{id}");
        chains.push(external.clone());
        rules.push(format!(
            "KUBE-NODEPORTS -m comment --comment {name} -m {protocol} -p {protocol} \
             --dport {node_port} -j {external}"
        ));
        if port.is_local() {
            let local = format!("KUBE-SVL-{id}");
            let why =
                |what| format!("-m comment --comment \"{what} {name} external destinations\"");
            let from_here = "-m addrtype --src-type LOCAL";
            rules.push(format!(
                "{external} {} -s {pods} -j {cluster}",
                why("pod traffic for")
            ));
            rules.push(format!(
                "{external} {} {from_here} -j KUBE-MARK-MASQ",
                why("masquerade LOCAL traffic for")
            ));
            rules.push(format!(
                "{external} {} {from_here} -j {cluster}",
                why("route LOCAL traffic for")
            ));
            rules.push(format!("{external} -j {local}"));
            chains.push(local.clone());
            balance(port, &local, &port.local_endpoints(), rules);
        } else {
            rules.push(format!(
                "{external} -m comment --comment \"masquerade traffic for {name} external \
                 destinations\" -j KUBE-MARK-MASQ"
            ));
            rules.push(format!("{external} -j {cluster}"));
        }
    }
    for endpoint in &port.endpoints {
        let chain = endpoint_chain(port, endpoint);
        rules.push(format!(
            "{chain} -m comment --comment {name} -s {} -j KUBE-MARK-MASQ",
            endpoint.ip()
        ));
        rules.push(format!(
            "{chain} -m comment --comment {name} -m {protocol} -p {protocol} -j DNAT \
             --to-destination {endpoint}"
        ));
        chains.push(chain);
    }
}

fn endpoint_chain(port: &ServicePort<'_>, endpoint: &SocketAddr) -> String {
    let id = letters(16, &[&port.name(), &endpoint.to_string()]);
    format!("KUBE-SEP-{id}")
}

/// Each endpoint with the same probability.
fn balance(port: &ServicePort<'_>, chain: &str, endpoints: &[SocketAddr], rules: &mut Vec<String>) {
    let count = endpoints.len();
    for (endpoint, left) in endpoints.iter().zip((1..=count).rev()) {
        let chance = if left > 1 {
            let probability = 1.0 / left as f64;
            format!("-m statistic --mode random --probability {probability:.10} ")
        } else {
            String::new()
        };
        rules.push(format!(
            "{chain} -m comment --comment \"{} -> {endpoint}\" {chance}-j {}",
            port.name(),
            endpoint_chain(port, endpoint)
        ));
    }
}

// Mode nftables.

fn nftables(family: Family, services: &[Service]) -> String {
    let ip = family.nft();
    let table = format!("{ip} kube-proxy");
    let address = match family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    };
    let node = family.node();
    let service_cidr = match family {
        Family::V4 => "10.96.0.0/16",
        Family::V6 => "fd96::/112",
    };
    // As each full synchronization: what is there is replaced, in one transaction.
    let mut script = format!("add table {table}\ndelete table {table}\ntable {table} {{\n");
    let verdicts = "inet_proto . inet_service : verdict";
    script += &format!(
        "comment \"rules for kube-proxy\"
        set cluster-ips {{ type {address}; comment \"Active ClusterIPs\"; }}
        set nodeport-ips {{
            type {address}; comment \"IPs that accept NodePort traffic\";
            elements = {{ {node} }}
        }}
        map firewall-ips {{
            type {address} . {verdicts};
            comment \"destinations that are subject to LoadBalancerSourceRanges\";
        }}
        map no-endpoint-nodeports {{
            type {verdicts};
            comment \"vmap to drop or reject packets to service nodeports with no endpoints\";
        }}
        map no-endpoint-services {{
            type {address} . {verdicts};
            comment \"vmap to drop or reject packets to services with no endpoints\";
        }}
        map service-ips {{
            type {address} . {verdicts};
            comment \"ClusterIP, ExternalIP and LoadBalancer IP traffic\";
        }}
        map service-nodeports {{ type {verdicts}; comment \"NodePort traffic\"; }}

        chain mark-for-masquerade {{ mark set mark or 0x4000; }}
        chain masquerading {{
            mark and 0x4000 == 0 return
            mark set mark xor 0x4000
            masquerade fully-random
        }}
        chain cluster-ips-check {{
            {ip} daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
            {ip} daddr {{ {service_cidr} }} drop comment \"Drop traffic to unallocated ClusterIPs\"
        }}
        chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}
        chain reject-chain {{
            comment \"helper for @no-endpoint-services / @no-endpoint-nodeports\"
            reject
        }}
        chain nodeport-endpoints-check {{
            {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
        }}
        chain service-endpoints-check {{
            {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services
        }}
        chain services {{
            {ip} daddr . meta l4proto . th dport vmap @service-ips
            {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
        }}

        chain filter-prerouting-pre-dnat {{
            type filter hook prerouting priority -110;
            ct state new jump firewall-check
        }}
        chain filter-output-pre-dnat {{
            type filter hook output priority -110;
            ct state new jump firewall-check
        }}
        chain filter-input {{
            type filter hook input priority 0;
            ct state new jump nodeport-endpoints-check
            ct state new jump service-endpoints-check
        }}
        chain filter-forward {{
            type filter hook forward priority 0;
            ct state new jump service-endpoints-check
            ct state new jump cluster-ips-check
        }}
        chain filter-output {{
            type filter hook output priority 0;
            ct state new jump service-endpoints-check
            ct state new jump cluster-ips-check
        }}
        chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
        chain nat-output {{ type nat hook output priority -100; jump services; }}
        chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}\n"
    );
    let mut elements = String::new();
    for port in ServicePort::all(family, services) {
        nft_service(&port, &mut script, &mut elements);
    }
    format!("{script}}}\n{elements}")
}

/// The chains of one port of a service, for within the table, and the elements of maps
/// that lead there.
fn nft_service(port: &ServicePort<'_>, chains: &mut String, elements: &mut String) {
    let (ip, pods, protocol) = (port.family.nft(), port.family.cluster_cidr(), port.protocol);
    let (cluster_ip, number) = (port.cluster_ip, port.service.port);
    let mut element = |map: &str, what: &str| {
        *elements += &format!("add element {ip} kube-proxy {map} {{ {what} }}\n");
    };
    if protocol == "tcp" {
        element("cluster-ips", &cluster_ip.to_string());
    }
    let addressed = format!("{cluster_ip} . {protocol} . {number}");
    if port.endpoints.is_empty() {
        let name = port.name();
        element(
            "no-endpoint-services",
            &format!("{addressed} comment \"{name}\" : goto reject-chain"),
        );
        return;
    }
    let suffix = nft_suffix(port);
    element(
        "service-ips",
        &format!("{addressed} : goto service-{suffix}"),
    );
    for endpoint in &port.endpoints {
        let chain = nft_endpoint_chain(port, endpoint);
        let address = endpoint.ip();
        *chains += &format!(
            "chain {chain} {{
                {ip} saddr {address} jump mark-for-masquerade
                meta l4proto {protocol} dnat to {endpoint}
            }}\n"
        );
    }
    let balanced = nft_balance(port, &port.endpoints);
    *chains += &format!(
        "chain service-{suffix} {{
            {ip} daddr {cluster_ip} {ip} saddr != {pods} jump mark-for-masquerade
            {balanced}
        }}\n"
    );
    let Some(node_port) = port.service.node_port else {
        return;
    };
    element(
        "service-nodeports",
        &format!("{protocol} . {node_port} : goto external-{suffix}"),
    );
    if port.is_local() {
        let balanced = nft_balance(port, &port.local_endpoints());
        *chains += &format!(
            "chain local-{suffix} {{ {balanced}; }}
            chain external-{suffix} {{
                {ip} saddr {pods} goto service-{suffix} comment \"short-circuit pod traffic\"
                fib saddr type local jump mark-for-masquerade comment \"masquerade local traffic\"
                fib saddr type local goto service-{suffix} comment \"short-circuit local traffic\"
                goto local-{suffix}
            }}\n"
        );
    } else {
        *chains += &format!(
            "chain external-{suffix} {{
                jump mark-for-masquerade
                goto service-{suffix}
            }}\n"
        );
    }
}

fn nft_suffix(port: &ServicePort<'_>) -> String {
    format!(
        "{}-tests/{}/{}/{}",
        letters(8, &[&port.name()]),
        port.service.name,
        port.protocol,
        port.protocol
    )
}

fn nft_endpoint_chain(port: &ServicePort<'_>, endpoint: &SocketAddr) -> String {
    let id = letters(8, &[&port.name(), &endpoint.to_string()]);
    let service = &port.service.name;
    // Names have no colons.
    let address = endpoint.ip().to_string().replace(':', ".");
    format!(
        "endpoint-{id}-tests/{service}/{0}/{0}__{address}/{1}",
        port.protocol,
        endpoint.port()
    )
}

/// Each endpoint with the same probability.
fn nft_balance(port: &ServicePort<'_>, endpoints: &[SocketAddr]) -> String {
    let ways: Vec<_> = endpoints
        .iter()
        .enumerate()
        .map(|(index, endpoint)| format!("{index} : goto {}", nft_endpoint_chain(port, endpoint)))
        .collect();
    format!(
        "numgen random mod {} vmap {{ {} }}",
        endpoints.len(),
        ways.join(", ")
    )
}

/// Runs a program with this on its standard input.
pub(crate) fn feed(
    namespace: &Namespace,
    program: &str,
    arguments: &[&str],
    text: &str,
) -> Result<()> {
    namespace.within(|| {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let mut stdin = child.stdin.take().context("no pipe")?;
        stdin
            .write_all(text.as_bytes())
            .with_context(|| format!("writing to {program}"))?;
        drop(stdin);
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{program}: {}\n{text}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    })
}

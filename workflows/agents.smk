# Agents at work (docs/agents.md): recorded episodes, one record file a section of `agents:`, and the figures they make.

if has_agents(config):

    rule record_agents:
        """The episodes that every system is served: an oracle acts, tools run, no model is needed."""
        output:
            result("agents/traces.jsonl"),
        log:
            log_file("agents/traces"),
        conda:
            "envs/cacheslide.yaml"
        params:
            config=config,
        script:
            "scripts/record_agents.py"

    for section in agent_sections(config):

        rule:
            name:
                f"measure_agents_{section}"
            input:
                traces=agent_traces() if section == "replay" else [],
                model=agent_model_files,
            output:
                result(f"agents/{section}.jsonl"),
            log:
                log_file(f"agents/{section}"),
            conda:
                "envs/cacheslide.yaml"
            threads: all_cores
            resources:
                exclusive=1,
            params:
                config=config,
                section=section,
            script:
                "scripts/measure_agents.py"

        if section in AGENT_FIGURES:

            rule:
                name:
                    AGENT_FIGURES[section]
                input:
                    result(f"agents/{section}.jsonl"),
                output:
                    figure(AGENT_FIGURES[section]),
                log:
                    log_file(f"figures/{AGENT_FIGURES[section]}"),
                conda:
                    "envs/cacheslide.yaml"
                params:
                    figure=AGENT_FIGURES[section],
                script:
                    "scripts/plot.py"

    rule agents:
        """All of the agents' records and their figures; figures 3 and 10 and the report join them with the study's."""
        input:
            agent_records(),
            agent_figures(),
        localrule: True
